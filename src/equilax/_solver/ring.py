"""Histories of a solver: rings of `m` trees, kept as leaves with a leading axis."""

import functools as ft
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Scalar

from .._custom_types import AxisName, BoolScalar, IntScalar
from .._dtype import at_least_single, promote, real
from .._mesh import total
from .._norm import max_norm


def empty(y: PyTree[Array], size: int) -> PyTree[Array]:
    """A ring of zeros, of the dtypes of `y`."""
    return jtu.tree_map(lambda x: jnp.zeros((size, *x.shape), x.dtype), y)


def ages(size: int, slot: IntScalar) -> Int[Array, " m"]:
    """How many writes before that into `slot` each row was written."""
    return (slot - jnp.arange(size, dtype=slot.dtype)) % size


def oldest_first(ring: PyTree[Array], next_slot: IntScalar) -> PyTree[Array]:
    """Turn a ring such that it can be written on from its first slot."""
    return jtu.tree_map(lambda x: jnp.roll(x, -next_slot, axis=0), ring)


def oldest_first_both(
    gram: Float[Array, "m m"], next_slot: IntScalar
) -> Float[Array, "m m"]:
    """The same for products of the rows of a ring with each other."""
    return jnp.roll(jnp.roll(gram, -next_slot, axis=0), -next_slot, axis=1)


def products(
    rows: PyTree[Array], vector: PyTree[Array], dtype: Any, axis_name: AxisName
) -> Array:
    """The real inner products of each row of a history with `vector`."""

    def product(row, x):
        row = jnp.conj(row.reshape(row.shape[0], -1))
        x = x.reshape(-1).astype(row.dtype)
        accumulate = promote(row.dtype, dtype)
        out = jnp.einsum(
            "mn,n->m",
            row,
            x,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=accumulate,
        )
        return out.real.astype(dtype)

    leaves = jtu.tree_leaves(jtu.tree_map(product, rows, vector))
    return total(ft.reduce(jnp.add, leaves), axis_name)


def gram(rows: PyTree[Array], dtype: Any, axis_name: AxisName) -> Float[Array, "m m"]:
    """The real inner products of all rows of a history with each other."""

    def product(x):
        x = x.reshape(x.shape[0], -1)
        accumulate = promote(x.dtype, dtype)
        out = jnp.einsum(
            "in,jn->ij",
            jnp.conj(x),
            x,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=accumulate,
        )
        return out.real.astype(dtype)

    leaves = jtu.tree_leaves(jtu.tree_map(product, rows))
    return total(ft.reduce(jnp.add, leaves), axis_name)


def combine(weights: Float[Array, " m"], rows: Array) -> Array:
    """The sum of `weights[j] * rows[j]`, in at least single precision."""
    dtype = at_least_single(rows.dtype)
    flat = rows.reshape(rows.shape[0], -1).astype(dtype)
    out = jnp.einsum(
        "m,mn->n", weights.astype(dtype), flat, precision=lax.Precision.HIGHEST
    )
    return out.reshape(rows.shape[1:])


def read(ring: PyTree[Array], slot: IntScalar) -> PyTree[Array]:
    take = lambda x: lax.dynamic_index_in_dim(x, slot, 0, keepdims=False)
    return jtu.tree_map(take, ring)


def write(
    ring: PyTree[Array], slot: IntScalar, row: PyTree[Array], is_live: BoolScalar
) -> PyTree[Array]:
    """Put `row` into its slot if `is_live`, in place."""

    # Selecting the row rather than the ring keeps the update in place.
    def put(ring, row, old):
        row = jnp.where(is_live, row.astype(ring.dtype), old)
        return lax.dynamic_update_index_in_dim(ring, row, slot, 0)

    return jtu.tree_map(put, ring, row, read(ring, slot))


def scaled(tree: PyTree[Array], factor: Scalar) -> PyTree[Array]:
    return jtu.tree_map(
        lambda x: x * factor.astype(real(x.dtype)).astype(x.dtype), tree
    )


def normalised(
    tree: PyTree[Array], dtype: Any, axis_name: AxisName
) -> tuple[PyTree[Array], Scalar, BoolScalar]:
    """`tree` divided by its largest element, that one, and whether it could be."""
    size = max_norm(tree, axis_name).astype(dtype)
    is_normal = (size >= jnp.finfo(dtype).tiny) & jnp.isfinite(size)
    return scaled(tree, 1 / jnp.where(is_normal, size, 1)), size, is_normal


def inner(
    a: PyTree[Array], b: PyTree[Array], dtype: Any, axis_name: AxisName
) -> Scalar:
    """The real inner product of two trees."""
    return products(jtu.tree_map(lambda x: x[None], a), b, dtype, axis_name)[0]
