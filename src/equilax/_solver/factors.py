"""The inverse of Broyden's method, as a product of factors made of its steps."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._custom_types import AxisName, IntScalar
from . import ring


class Factors(eqx.Module):
    r"""The negative of $H_k$, the product of $I + u_j d_j^T / (d_j^T d_j)$ over `j`.

    With the direction $d_j$ of step `j`, its length $\lambda_j$, and
    $u_j = d_{j+1} + (\lambda_j - 1) d_j$ (Kelley 1995, section 7.3).

    **Attributes:**

    - `rows`: A ring of the directions, each divided by its largest element.
    - `units`: These largest elements.
    - `gram`: The products of the rows with each other.
    - `has_next`: Whether the row after this one makes a factor with it.
    - `lengths`: Of the steps, or `None` if all are one.
    - `num_used`: The directions since the history began, those already lost included.
    """

    rows: PyTree[Array]
    units: Float[Array, " m"]
    gram: Float[Array, "m m"]
    has_next: Bool[Array, " m"]
    lengths: Float[Array, " m"] | None
    num_used: IntScalar


class Applied(eqx.Module):
    r"""A product of the factors with a vector $z$.

    **Attributes:**

    - `weights`: That of each row in the product, beside $z$ itself.
    - `overlaps`: The inner products of the rows with the product.
    - `last`: $d_j^T z / (d_j^T d_j)$ of the newest direction, which has no factor yet.
    """

    weights: Float[Array, " m"]
    overlaps: Float[Array, " m"]
    last: Scalar


def empty(y: PyTree[Array], size: int, dtype: Any, has_lengths: bool) -> Factors:
    return Factors(
        rows=ring.empty(y, size),
        units=jnp.ones((size,), dtype),
        gram=jnp.zeros((size, size), dtype),
        has_next=jnp.zeros((size,), bool),
        lengths=jnp.ones((size,), dtype) if has_lengths else None,
        num_used=jnp.zeros((), jnp.int32),
    )


def resume(old: Factors, next_slot: IntScalar) -> Factors:
    """The history of an earlier solve, its last direction without one to follow it."""
    turn = lambda x: ring.oldest_first(x, next_slot)
    size = old.units.shape[0]
    is_whole = old.num_used <= size
    return Factors(
        rows=turn(old.rows),
        units=turn(old.units),
        gram=ring.oldest_first_both(old.gram, next_slot),
        has_next=turn(old.has_next),
        lengths=None if old.lengths is None else turn(old.lengths),
        num_used=jnp.where(is_whole, old.num_used, 0),
    )


def apply(
    old: Factors,
    slot: IntScalar,
    vector: PyTree[Array],
    axis_name: AxisName,
    *,
    transpose: bool = False,
) -> Applied:
    """Multiply `vector` by the factors, in terms of inner products alone.

    **Arguments:**

    - `slot`: The next to be written, which is that of the oldest direction.
    - `transpose`: Whether to multiply by the transpose.
    """
    m, dtype = old.units.shape[0], old.units.dtype
    by_age = lambda x: jnp.roll(x, -slot, axis=0)
    overlaps = by_age(ring.products(old.rows, vector, dtype, axis_name))
    units, has_next = by_age(old.units), by_age(old.has_next)
    extra = None if old.lengths is None else by_age(old.lengths) - 1
    gram = by_age(by_age(old.gram).T).T
    is_row = jnp.arange(m, dtype=jnp.int32) >= m - old.num_used
    squares = jnp.diagonal(gram) * units
    is_row = is_row & (squares > 0)
    inverse = jnp.where(is_row, 1 / jnp.where(is_row, squares, 1), 0)
    weights = [jnp.zeros((), dtype) for _ in range(m)]
    for i in reversed(range(m - 1)) if transpose else range(m - 1):
        # The two vectors of the factor, each as weights of rows.
        away = [(i + 1, units[i + 1])]
        if extra is not None:
            away.append((i, extra[i] * units[i]))
        here = [(i, inverse[i])]
        left, right = (away, here) if transpose else (here, away)
        product = sum(weight * overlaps[j] for j, weight in left)
        product = jnp.where(has_next[i] & is_row[i], product, 0)
        for j, weight in right:
            weights[j] = weights[j] + product * weight
            overlaps = overlaps + product * weight * gram[:, j]
    by_slot = lambda x: jnp.roll(x, slot, axis=0)
    last = overlaps[m - 1] * inverse[m - 1]
    return Applied(by_slot(jnp.stack(weights)), by_slot(overlaps), last)
