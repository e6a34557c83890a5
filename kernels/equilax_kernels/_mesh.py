"""The manual mesh axes, of `jax.shard_map`, over which a value varies."""

import functools as ft
from typing import Any

import jax
from jax import lax
from jaxtyping import Array


def varying(*arrays: Array) -> frozenset[str]:
    """All axes over which any of `arrays` varies."""
    axes = (frozenset(jax.typeof(x).mat.varying) for x in arrays)
    return ft.reduce(frozenset.union, axes, frozenset())


def to_vary(x: Array, axes: frozenset[str]) -> Array:
    """`x`, declared to vary over all of `axes`."""
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def struct_like(shape: tuple[int, ...], dtype: Any, x: Array) -> jax.ShapeDtypeStruct:
    """The type of a result that varies over the axes over which `x` does."""
    mat = jax.typeof(x).mat
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=mat)
