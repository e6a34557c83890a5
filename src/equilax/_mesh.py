"""Mesh axes: over which a value varies, and how it is reduced over them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Inexact, PyTree

from ._custom_types import AxisName


def varying(x: ArrayLike) -> frozenset[str]:
    """The manual mesh axes over which `x` differs between devices."""
    return frozenset(jax.typeof(x).mat.varying)


def vary_over(x: ArrayLike, axes: frozenset[str]) -> Array:
    """Declare `x` to vary over `axes`, those over which it varies already included."""
    # Casting an axis a second time is an error, hence the difference.
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else jnp.asarray(x)


def all_vary(tree: PyTree[Any], axes: frozenset[str]) -> PyTree[Any]:
    """`tree`, each of whose arrays varies over `axes`."""
    return jtu.tree_map(lambda x: vary_over(x, axes) if eqx.is_array(x) else x, tree)


def any_varying(*trees: PyTree[Any]) -> frozenset[str]:
    """The union of the axes over which any leaf varies. Empty outside `shard_map`."""
    leaves = jtu.tree_leaves(eqx.filter(trees, eqx.is_array))
    return frozenset().union(*(varying(x) for x in leaves))


def manual_axes() -> frozenset[str]:
    """The axes of the mesh of the `shard_map`s around, if there are any."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def is_checked(axis: str) -> bool:
    """Whether the `shard_map` over `axis` tells what varies: with `check_vma=True`."""
    return axis in varying(lax.axis_index(axis))


def as_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names of `axis_name`: none, one or several."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _bound_names(axis_name: AxisName) -> tuple[str, ...]:
    """The names, or an error if no `shard_map` around has them."""
    names = as_names(axis_name)
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                "`axis_name` must name mesh axes of a `jax.shard_map` around; got "
                f"{name!r}, expected some of {sorted(manual_axes())}."
            ) from None
    return names


def num_parts(axis_name: AxisName) -> int:
    """Over how many devices something is split that is so along `axis_name`."""
    names = _bound_names(axis_name)
    return lax.axis_size(names) if names else 1


def total(tree: PyTree[Array], axis_name: AxisName) -> PyTree[Array]:
    """The sum over all devices, in one all-reduce of all leaves of one dtype."""
    names = _bound_names(axis_name)
    return lax.psum(tree, names) if names else tree


def from_all(x: Inexact[Array, "..."], axis_name: AxisName) -> Inexact[Array, "n ..."]:
    """What each device has, along a new first axis, the same on all of them.

    By a sum in which each has a place of its own. An all-reduce by maximum loses what
    is not a number, has no derivative, and would be a second one beside a sum.
    """
    names = _bound_names(axis_name)
    places = jnp.arange(lax.axis_size(names), dtype=jnp.int32)
    is_here = places == lax.axis_index(names)
    is_here = is_here.reshape(-1, *(1,) * x.ndim)
    return lax.psum(jnp.where(is_here, x[None], 0), names)


def on_all(x: Bool[Array, ""], axis_name: AxisName) -> Bool[Array, ""]:
    """Whether it is so on every device."""
    names = _bound_names(axis_name)
    if not names:
        return x
    return lax.psum((~x).astype(jnp.int32), names) == 0
