"""One checkpoint in one file, which a crash at any moment leaves whole.

The file is a line of JSON, the header; then what `equinox.tree_serialise_leaves`
writes, which is NumPy's format; then the SHA-256 of all that. Nothing in it is ever
unpickled: NumPy refuses to, unless told otherwise.
"""

import contextlib
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
_MAX_HEADER = 1 << 16
_NUM_DIGEST = hashlib.sha256().digest_size


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
    try:
        _replace_file(path, temporary, *parts)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # Of a full disk it holds the last that was free.
        # A full disk does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace_file(path: Path, temporary: Path, *parts: bytes) -> None:
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
    header = {"format": _FORMAT, "version": _VERSION, "config": config}
    content = json.dumps(header).encode() + b"\n" + serialise(tree)
    replace_file(path, content, hashlib.sha256(content).digest())


def load(path: Path, like: T, config: dict[str, Any]) -> T:
    """**Arguments:**

    - `like`: A tree of the structure, shapes and dtypes that were saved.
    - `config`: As for `save`.

    **Raises:**

    - `CheckpointError`: If the file is not a whole checkpoint of this `config`.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline(_MAX_HEADER)
            header = _parse(path, line)  # Before the rest: it may be any file at all.
            data = line + file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    content, digest = data[:-_NUM_DIGEST], data[-_NUM_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(
            f"{path} is truncated or damaged: its content does not match the checksum "
            "at its end."
        )
    _check_config(path, header.get("config"), config)
    stream = io.BytesIO(content[len(line) :])
    try:
        tree = eqx.tree_deserialise_leaves(stream, like)
    except RuntimeError as error:  # What Equinox wraps everything that goes wrong in.
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise CheckpointError(
            f"{path} holds something else than this example saves: {cause}"
        ) from error
    if stream.read(1):
        raise CheckpointError(f"{path} holds more than this example saves.")
    return tree


def _parse(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (RecursionError, ValueError):
        header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of this example: it does not begin with the "
            "header of one. It is another kind of file, or damaged."
        )
    if header.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has version {header.get('version')!r} of the format; this example "
            f"reads version {_VERSION}."
        )
    return header


def check_same(path: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    """Refuse a checkpoint of another configuration, and say what differs."""
    names = [n for n in {**config, **found} if found.get(n) != config.get(n)]
    if names:
        differences = ", ".join(
            f"{n} is {found.get(n)!r} there and {config.get(n)!r} here" for n in names
        )
        raise CheckpointError(f"{path} is of another configuration: {differences}.")


def _check_config(path: Path, found: Any, config: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} has no configuration in its header.")
    check_same(path, found, config)
