import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from .._check import check_axis_name, check_callable, check_data, check_instance
from .._mesh import all_vary, as_names, manual_axes


def shard_vmap(
    fn: Callable,
    mesh: Mesh,
    axis_name: str | tuple[str, ...],
    *,
    in_axes: PyTree[int | None] = 0,
) -> Callable:
    """`jax.vmap` of `fn`, with the batch spread over the devices of a mesh.

    Each device runs the solves in `fn` on its own samples and waits for nobody: there
    is no communication until the batch is done. (A plain `jax.jit` of a vmapped solve
    on a sharded batch asks all devices in every step whether one of them goes on.) The
    gradient of what the samples share, such as the parameters of `fn`, is summed over
    the devices once. With an `fn` that is a pytree, as an Equinox module is, and with
    arguments that are not mapped, that is one all-reduce for all of it.

    A batch that the devices do not divide is filled up with copies of its last sample,
    whose results are cut off again. Use it under `jax.jit`, `jax.grad`, and inside a
    larger program on the same mesh: the axes that it does not name are left alone.

    **Arguments:**

    - `fn`: A function of one sample, such as an [`equilax.nn.FixedPointLayer`][]. A
        solve in it must have `throw=False`, as a layer does.
    - `mesh`: The devices.
    - `axis_name`: The axes of `mesh` over which the batch is spread.
    - `in_axes`: The axis of the batch in each argument, as for `jax.vmap`: a number or
        `None` for all arguments, or a tuple with a tree of these for each. Leaves that
        are not arrays are handed on as they are. Keyword only argument.

    **Returns:**

    A function of the batch, with the results along the first axis of each array.

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for an axis that the mesh does not
        have, and for batches of unequal size.

    Cost: that of `jax.vmap(fn)` on the part of each device. Memory: on each device its
    part of the batch, and all of what the samples share.
    """
    check_callable("fn", fn, "fn(*args)")
    check_instance("mesh", mesh, Mesh)
    check_axis_name(axis_name)
    names = as_names(axis_name)
    check_data(in_axes=in_axes)
    unknown = sorted(set(names) - set(mesh.axis_names))
    if unknown or not names:
        raise ValueError(
            f"`axis_name` must name axes of `mesh`; got {axis_name!r}, expected some "
            f"of {tuple(mesh.axis_names)}."
        )
    return _ShardVmap(fn, in_axes, mesh, names)


class _ShardVmap(eqx.Module):
    fn: Callable
    in_axes: PyTree[int | None]
    mesh: Any = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, *args):
        taken = sorted(set(self.names) & manual_axes())
        if taken:
            raise ValueError(
                f"`axis_name` must name axes that no `jax.shard_map` around has taken; "
                f"got {taken}. There the batch is on its devices already: use "
                "`jax.vmap`."
            )
        return _run(self, args)


@eqx.filter_jit
def _run(self: _ShardVmap, args: tuple) -> PyTree[Any]:
    axes = _axes_of(self.in_axes, args)
    leaves, treedef = jtu.tree_flatten(args)
    is_array = [eqx.is_array(x) for x in leaves]
    axes = [a if is_a else None for a, is_a in zip(axes, is_array, strict=True)]
    size = _batch_size(args, axes)
    batch = [
        None if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(leaves, axes, strict=True)
    ]
    rest = [x if a is None else None for x, a in zip(leaves, axes, strict=True)]
    shared, static = eqx.partition((self.fn, rest), eqx.is_array)
    found = []

    def local(batch, shared):
        # Once, and here: each use of what does not vary yet would be summed by itself.
        shared = all_vary(shared, frozenset(self.names))
        fn, rest = eqx.combine(shared, static)

        def one(sample):
            leaves = [
                r if a is None else x
                for x, r, a in zip(sample, rest, axes, strict=True)
            ]
            out = fn(*jtu.tree_unflatten(treedef, leaves))
            out, out_static = eqx.partition(out, eqx.is_array)
            found.append(out_static)
            return out

        return jax.vmap(one)(batch)

    out = _spread(self, local, batch, shared, size)
    return eqx.combine(out, found[-1])


def _spread(self: _ShardVmap, local: Callable, batch, shared, size: int):
    """Call `local` on each device, with its part of `batch` and all of `shared`."""
    split, whole = PartitionSpec(self.names), PartitionSpec()
    context = jax.sharding.get_abstract_mesh()
    # Within another `shard_map` the mesh is that one's, with some axes taken.
    mesh = context if context.manual_axes else self.mesh
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    is_explicit = any(types[name] is AxisType.Explicit for name in self.names)

    def place(tree, spec):
        if not is_explicit:
            return tree
        sharding = NamedSharding(mesh, spec)
        return jtu.tree_map(lambda x: jax.reshard(x, sharding), tree)

    num_devices = math.prod(self.mesh.shape[name] for name in self.names)
    missing = -size % num_devices
    if missing:
        batch = jtu.tree_map(lambda x: _fill(x, missing), place(batch, whole))
    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, whole),
        out_specs=split,
        axis_names=set(self.names),
    )
    out = run(place(batch, split), place(shared, whole))
    # An axis that the devices do not divide is on none of them.
    return jtu.tree_map(lambda x: x[:size], place(out, whole)) if missing else out


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A leaf, which `None` is not."""

    axis: int | None


def _axes_of(in_axes: PyTree[int | None], args: tuple) -> list[int | None]:
    """The axis of each leaf of `args`."""
    boxed = jtu.tree_map(_Axis, in_axes, is_leaf=lambda a: a is None)
    try:
        full = jax.tree.broadcast(boxed, args)
    except ValueError as error:
        raise ValueError(
            f"`in_axes` must be a prefix of the tuple of arguments; got {in_axes!r} "
            f"for arguments of the structure {jtu.tree_structure(args)}."
        ) from error
    axes = [box.axis for box in jtu.tree_leaves(full)]
    if any(isinstance(a, bool) or not isinstance(a, (int, type(None))) for a in axes):
        raise TypeError(f"`in_axes` must hold integers and `None`; got {in_axes!r}.")
    return axes


def _batch_size(args: tuple, axes: list[int | None]) -> int:
    sizes = {}
    paths = jtu.tree_leaves_with_path(args)
    for (path, x), axis in zip(paths, axes, strict=True):
        if axis is None:
            continue
        where = f"args{jtu.keystr(path)}"
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"`in_axes` must be axes of the arguments; got {axis} for `{where}`, "
                f"which has the shape {x.shape}."
            )
        sizes[where] = x.shape[axis]
    if not sizes:
        raise ValueError(
            "`in_axes` must map at least one array; got arguments of the structure "
            f"{jtu.tree_structure(args)} with the axes {axes}."
        )
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{size} in `{where}`" for where, size in sizes.items())
        raise ValueError(f"The batch must have one size in all arguments; got {found}.")
    return next(iter(sizes.values()))


def _fill(x: Array, missing: int) -> Array:
    """`x` with so many copies of its last sample."""
    return jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
