"""One checkpoint in one file, which a crash at any moment leaves whole.

The file is a line of JSON, the header, followed by what
`equinox.tree_serialise_leaves` writes. Nothing in it is ever unpickled.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx


T = TypeVar("T")
_FORMAT = "equilax-example-checkpoint"
_VERSION = 1
_FIELDS = {"format", "version", "config", "sha256", "num_bytes"}


class CheckpointError(Exception):
    """A file that cannot be resumed from. The message names it."""


def serialise(tree: Any) -> bytes:
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, tree)
    return buffer.getvalue()


def replace_file(path: Path, *parts: bytes) -> None:
    """Write a file such that, whenever the process dies, it is the old one or the new.

    The data must be on the disk before the name points to it, and the name before this
    returns: hence a flush of the file, the renaming, and a flush of the directory. The
    temporary file has one name only, so what a killed run left of it is written over.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # Elsewhere a directory cannot be opened.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def save(path: Path, tree: Any, config: dict[str, Any]) -> None:
    """**Arguments:**

    - `tree`: What to save, a pytree of arrays and numbers.
    - `config`: What the run depends on, in JSON's types. `load` insists on the same.
    """
    payload = serialise(tree)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": config,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "num_bytes": len(payload),
    }
    replace_file(path, json.dumps(header).encode() + b"\n", payload)


def load(path: Path, like: T, config: dict[str, Any]) -> T:
    """**Arguments:**

    - `like`: A tree of the structure, shapes and dtypes that were saved.
    - `config`: As for `save`.

    **Raises:**

    - `CheckpointError`: If the file is not a whole checkpoint of this `config`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    line, _, payload = data.partition(b"\n")
    header = _parse(path, line)
    _check_config(path, header["config"], config)
    if len(payload) != header["num_bytes"]:
        raise CheckpointError(
            f"{path} is truncated or has been added to: it holds {len(payload)} bytes "
            f"after its header, which promises {header['num_bytes']}."
        )
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise CheckpointError(
            f"{path} is corrupt: its content does not match the checksum in its header."
        )
    stream = io.BytesIO(payload)
    try:
        tree = eqx.tree_deserialise_leaves(stream, like)
    except (EOFError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was written by another version of this example: {error}"
        ) from error
    if stream.read(1):
        raise CheckpointError(
            f"{path} was written by another version of this example: it holds more "
            "than this one reads."
        )
    return tree


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (RecursionError, ValueError):
        header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of this example: it does not begin with its "
            "header. It is another kind of file, or damaged."
        )
    if header.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has version {header.get('version')!r} of the format; this example "
            f"reads version {_VERSION}."
        )
    if header.keys() != _FIELDS or not isinstance(header["config"], dict):
        raise CheckpointError(
            f"{path} is corrupt: its header has the fields {sorted(header)}, where "
            f"{sorted(_FIELDS)} belong."
        )
    return header


def _check_config(path: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    names = [n for n in {**config, **found} if found.get(n) != config.get(n)]
    if names:
        differences = ", ".join(
            f"{n} is {found.get(n)!r} there and {config.get(n)!r} here" for n in names
        )
        raise CheckpointError(f"{path} is of another configuration: {differences}.")
