"""One cycle of GMRES: its basis, and the small system in it."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Scalar

from .._custom_types import AxisName, BoolScalar, IntScalar
from .._mesh import total
from .._norm import two_norm


class Cycle(eqx.Module):
    # Of a system whose right-hand side has length one. The triangle is the factorised
    # Hessenberg matrix, the identity where it hasn't been filled; `rotation` is the
    # product of Givens' that made it so, and `rhs` what it is to be solved for, with
    # the residual at its end.
    x: Float[Array, " n"]
    basis: Float[Array, "m_plus_1 n"]
    triangle: Float[Array, "m m"]
    rotation: Float[Array, "m_plus_1 m_plus_1"]
    rhs: Float[Array, " m_plus_1"]
    num_filled: IntScalar
    estimate: Scalar
    at_restart: Scalar
    num_steps: IntScalar
    is_live: BoolScalar


def start(
    restart: int, axis_name: AxisName, vector: Float[Array, " n"], tolerance: Scalar
) -> Cycle:
    dtype = vector.dtype
    norm = two_norm(vector, axis_name).astype(dtype)
    basis = jnp.zeros((restart + 1, vector.size), dtype).at[0].set(vector)
    zero = jnp.zeros((), jnp.int32)
    return Cycle(
        x=jnp.zeros_like(vector),
        basis=basis,
        triangle=jnp.eye(restart, dtype=dtype),
        rotation=jnp.eye(restart + 1, dtype=dtype),
        rhs=jnp.zeros((restart + 1,), dtype).at[0].set(norm),
        num_filled=zero,
        estimate=norm,
        at_restart=norm,
        num_steps=zero,
        is_live=norm > tolerance,
    )


def _coordinates(now: Cycle) -> Float[Array, " m"]:
    """The solution in the basis of this cycle, by back substitution."""
    size = now.triangle.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    rhs = jnp.where(index < now.num_filled, now.rhs[:size], 0)

    # Column by column, from the last: what is left of the right-hand side.
    def body(k, carry):
        left, found = carry
        i = size - 1 - k
        column = lax.dynamic_index_in_dim(now.triangle, i, 1, keepdims=False)
        is_here = index == i
        pivot = jnp.sum(jnp.where(is_here, column, 0))
        value = jnp.sum(jnp.where(is_here, left, 0))
        # A pivot of zero is a direction that the matrix takes to nothing.
        value = jnp.where(pivot == 0, 0, value / jnp.where(pivot == 0, 1, pivot))
        return left - value * column, jnp.where(is_here, value, found)

    _, found = lax.fori_loop(0, size, body, (rhs, jnp.zeros_like(rhs)))
    return found


def moved(now: Cycle) -> Float[Array, " n"]:
    exact = lax.Precision.HIGHEST
    # With a zero for the last vector: to cut that off would copy the others.
    found = jnp.pad(_coordinates(now), (0, 1))
    return now.x + jnp.matmul(found, now.basis, precision=exact)


def orthogonalise(basis, column, product, axis_name: AxisName):
    """Against the first `column + 1` vectors, by Gram and Schmidt, twice."""
    is_older = jnp.arange(basis.shape[0], dtype=column.dtype) <= column
    exact = lax.Precision.HIGHEST
    entries = jnp.zeros(basis.shape[0], basis.dtype)
    for _ in range(2):
        overlap = total(jnp.matmul(basis, product, precision=exact), axis_name)
        overlap = jnp.where(is_older, overlap, 0)
        product = product - jnp.matmul(overlap, basis, precision=exact)
        entries = entries + overlap
    return product, entries


def rotate(now: Cycle, column: IntScalar, entries, norm):
    """Bring a column of the Hessenberg matrix to upper triangular form (Givens)."""
    size = now.triangle.shape[0]
    index = jnp.arange(size + 1, dtype=column.dtype)
    is_here, is_next = index == column, index == column + 1
    entries = jnp.where(is_next, norm, entries)
    exact = lax.Precision.HIGHEST
    entries = jnp.matmul(now.rotation, entries, precision=exact)
    pick = lambda x, mask: jnp.sum(jnp.where(mask, x, 0), axis=-1)
    a, b = pick(entries, is_here), pick(entries, is_next)
    length = jnp.hypot(a, b)
    divisor = jnp.where(length == 0, 1, length)
    c, s = jnp.where(length == 0, 1, a / divisor), b / divisor

    def turn(x):
        upper, lower = pick(x.T, is_here), pick(x.T, is_next)
        here, following = (
            m.reshape(-1, *(1,) * (x.ndim - 1)) for m in (is_here, is_next)
        )
        x = jnp.where(here, c * upper + s * lower, x)
        return jnp.where(following, c * lower - s * upper, x)

    rhs = turn(now.rhs)
    filled = jnp.where(is_here, length, entries)
    filled = jnp.where(index <= column, filled, 0)[:size]
    triangle = jnp.where(is_here[None, :size], filled[:, None], now.triangle)
    estimate = jnp.abs(pick(rhs, is_next))
    return triangle, turn(now.rotation), rhs, estimate
