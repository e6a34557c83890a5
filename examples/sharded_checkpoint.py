"""Checkpoints by Orbax, written by all processes and read by however many there are.

Orbax writes into a temporary folder and renames it, so that a run which dies while it
writes leaves the checkpoints before. What is damaged later TensorStore notices, which
keeps a checksum of all that it stores for Orbax. Beside the arrays stands what the run
depends on.
"""

from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu
import orbax.checkpoint as ocp
from checkpoint import check_same, CheckpointError
from jax.sharding import NamedSharding


T = TypeVar("T")
_FORMAT = "equilax-example-sharded-1"


def has_steps(folder: Path) -> bool:
    return folder.is_dir() and any(x.name.isdecimal() for x in folder.iterdir())


def make_manager(folder: Path) -> ocp.CheckpointManager:
    """All processes must make it, on a folder that all of them see."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        cleanup_tmp_directories=True,
        # Small as this model is, to write behind its back would take longer. And so a
        # run that dies after a step that saves has left the checkpoint.
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, tree: Any, config: dict[str, Any]
) -> None:
    """**Arguments:**

    - `tree`: What to save, a pytree of arrays that are replicated.
    - `config`: What the run depends on, in JSON's types. `restore` insists on the same.

    **Raises:**

    - `OSError`: If it cannot be written. The checkpoints before are as they were.
    """
    args = ocp.args.Composite(
        arrays=ocp.args.StandardSave(_by_name(tree)),
        header=ocp.args.JsonSave({"format": _FORMAT, "config": config}),
    )
    try:
        manager.save(step, args=args, force=True)
    except (OSError, ValueError) as error:  # TensorStore's is the latter.
        path = Path(manager.directory) / str(step)
        raise OSError(
            f"{path} cannot be written; --resume goes on from the checkpoint before. "
            f"{error}"
        ) from error


def restore(
    manager: ocp.CheckpointManager,
    like: T,
    config: dict[str, Any],
    sharding: NamedSharding,
) -> tuple[T, int]:
    """**Arguments:**

    - `like`: A tree of the structure, shapes and dtypes that were saved.
    - `config`: As for `save`.
    - `sharding`: Where the arrays go, whatever devices they came from.

    **Returns:**

    The tree of the last checkpoint, and its step; `like` and zero if there is none.

    **Raises:**

    - `CheckpointError`: If that is not a whole checkpoint of this `config`.
    """
    step = manager.latest_step()
    if step is None:
        return like, 0
    path = Path(manager.directory) / str(step)
    header = _read(path, manager, step, header=ocp.args.JsonRestore())["header"]
    _check(path, header, config)
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    wanted = ocp.args.StandardRestore(jtu.tree_map(struct, _by_name(like)))
    arrays = _read(path, manager, step, arrays=wanted)["arrays"]
    dynamic, static = eqx.partition(like, eqx.is_array)
    leaves = [arrays[name] for name in _by_name(like)]
    dynamic = jtu.tree_unflatten(jtu.tree_structure(dynamic), leaves)
    return eqx.combine(dynamic, static), step


def _by_name(tree: Any) -> dict[str, Any]:
    """A dictionary, which can be read without the classes of this example."""
    paths = jtu.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {jtu.keystr(p, simple=True, separator="."): x for p, x in paths}


def _read(path: Path, manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        (name,) = items
        raise CheckpointError(
            f"{path} is damaged, or not of this example: its {name} cannot be read. "
            "Without that folder, --resume goes on from the checkpoint before. "
            f"{error}"
        ) from error


def _check(path: Path, header: Any, config: dict[str, Any]) -> None:
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this example.")
    found = header.get("config")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: its header has no configuration.")
    check_same(path, found, config)
