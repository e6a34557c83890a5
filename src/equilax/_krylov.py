"""GMRES in products alone, batched and sharded as any other loop of the library."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Scalar

from ._batching import AbstractBatching, Loop
from ._custom_types import BoolScalar, IntScalar
from ._dtype import at_least_single
from ._misc import any_varying, hoist, per_sample, tree_where, vary_over
from ._norm import divisor, two_norm


# A cycle that leaves more than this of the residual has stagnated.
_NO_GAIN = 0.99


class _Carry(eqx.Module):
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


class Krylov(eqx.Module):
    """How a solve ended.

    **Attributes:**

    - `value`: The solution.
    - `residual`: The two-norm of `vector - mv(value)`, evaluated.
    - `num_steps`: The products taken, but for the last, which tests the value.
    """

    value: Float[Array, "..."]
    residual: Float[Array, "..."]
    num_steps: Array


def _start(restart: int, vector: Float[Array, " n"], tolerance: Scalar) -> _Carry:
    dtype = vector.dtype
    norm = two_norm(vector).astype(dtype)
    basis = jnp.zeros((restart + 1, vector.size), dtype).at[0].set(vector)
    zero = jnp.zeros((), jnp.int32)
    return _Carry(
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


def _coordinates(now: _Carry) -> Float[Array, " m"]:
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


def _moved(now: _Carry) -> Float[Array, " n"]:
    size = now.triangle.shape[0]
    exact = lax.Precision.HIGHEST
    return now.x + jnp.matmul(_coordinates(now), now.basis[:size], precision=exact)


def _orthogonalise(basis, column, product):
    """Against the first `column + 1` vectors, by Gram and Schmidt, twice."""
    is_older = jnp.arange(basis.shape[0], dtype=column.dtype) <= column
    exact = lax.Precision.HIGHEST
    total = jnp.zeros(basis.shape[0], basis.dtype)
    for _ in range(2):
        overlap = jnp.matmul(basis, product, precision=exact)
        overlap = jnp.where(is_older, overlap, 0)
        product = product - jnp.matmul(overlap, basis, precision=exact)
        total = total + overlap
    return product, total


def _rotate(now: _Carry, column: IntScalar, entries, norm):
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


def _advance(
    max_steps: int, tolerance: Scalar, passes: IntScalar, now: _Carry, vector, product
) -> _Carry:
    """One pass: a vector more in the basis, or the residual with which it begins anew.

    A cycle has a pass for each of `restart` vectors and one more, in which the residual
    of what has been found is evaluated. That is the same for all samples of a batch, so
    that the slot of the basis that is written is one number.
    """
    size = now.triangle.shape[0]
    column = passes % (size + 1)
    is_new_cycle = column == size
    fresh, entries = _orthogonalise(now.basis, column, product)
    fresh = jnp.where(is_new_cycle, vector - product, fresh)
    norm = two_norm(fresh).astype(fresh.dtype)
    row = fresh / jnp.where(norm == 0, 1, norm)
    slot = (column + 1) % (size + 1)
    old_row = lax.dynamic_index_in_dim(now.basis, slot, 0, keepdims=False)
    row = jnp.where(now.is_live, row, old_row)
    basis = lax.dynamic_update_index_in_dim(now.basis, row, slot, 0)

    begun = (
        jnp.eye(size, dtype=row.dtype),
        jnp.eye(size + 1, dtype=row.dtype),
        jnp.zeros_like(now.rhs).at[0].set(norm),
        norm,
        jnp.zeros((), jnp.int32),
        norm,
    )
    grown = (*_rotate(now, column, entries, norm), now.num_filled + 1, now.at_restart)
    changed = tree_where(is_new_cycle, begun, grown)
    triangle, rotation, rhs, estimate, num_filled, at_restart = changed
    num_steps = now.num_steps + 1
    is_stuck = is_new_cycle & (norm > _NO_GAIN * now.at_restart)
    # Also false where the estimate is not a number.
    is_live = (estimate > tolerance) & (num_steps < max_steps) & ~is_stuck
    new = _Carry(
        now.x,
        now.basis,
        triangle,
        rotation,
        rhs,
        num_filled,
        estimate,
        at_restart,
        num_steps,
        is_live,
    )
    new = tree_where(now.is_live, new, now)
    new = eqx.tree_at(lambda c: c.basis, new, basis)
    return _close_cycle(new, column == size - 1)


def _close_cycle(now: _Carry, is_end: BoolScalar) -> _Carry:
    """Add to `x` what this cycle has found, at its end."""
    # A sample that has stopped does so after the loop.
    is_moved = is_end & now.is_live
    x = vary_over(now.x, any_varying(now))
    x = lax.cond(
        is_end,
        lambda now, x: jnp.where(now.is_live, _moved(now), x),
        lambda _, x: x,
        now,
        x,
    )
    num_filled = jnp.where(is_moved, 0, now.num_filled)
    return eqx.tree_at(lambda c: (c.x, c.num_filled), now, (x, num_filled))


def gmres(
    mv: Callable[[Array], Array],
    vector: Float[Array, "..."],
    *,
    tolerance: Float[Array, "..."],
    restart: int,
    max_steps: int,
    batching: AbstractBatching,
    is_batch: bool = False,
) -> Krylov:
    r"""Solve `mv(x) = vector` by restarted GMRES (Saad and Schultz 1986, algorithm 4).

    **Arguments:**

    - `mv`: A linear function.
    - `vector`: The right-hand side, one real vector a sample.
    - `tolerance`: The two-norm of the residual to reach, relative to that of `vector`.
    - `restart`: The vectors that are kept.
    - `max_steps`: The most products.
    - `batching`: How the solve runs under `jax.vmap`.
    - `is_batch`: Whether `vector` and `tolerance` are batches that `mv` takes as one.

    Cost: a product a step, `4 * restart` passes through `vector`. Memory: `restart + 3`
    times `vector`.
    """
    each = per_sample(is_batch)
    dtype = at_least_single(vector.dtype)
    unit = each(lambda v: divisor(two_norm(v)))(vector).astype(dtype)
    scale = unit[..., None] if is_batch else unit
    vector_dtype = vector.dtype
    scaled = vector.astype(dtype) / scale
    inputs, static = eqx.partition(
        (hoist(mv, vector), scaled, tolerance.astype(dtype)), eqx.is_array
    )
    size = max(1, min(restart, vector.shape[-1]))

    def init(inputs):
        _, vector, tolerance = eqx.combine(inputs, static)
        return each(ft.partial(_start, size))(vector, tolerance)

    def body(passes, now, inputs):
        mv, vector, tolerance = eqx.combine(inputs, static)
        column = passes % (size + 1)

        def choose(now):
            slot = jnp.minimum(column, size)
            row = lax.dynamic_index_in_dim(now.basis, slot, 0, keepdims=False)
            return jnp.where(column == size, now.x, row)

        product = mv(each(choose)(now).astype(vector_dtype)).astype(dtype)
        advance = lambda now, v, p, t: _advance(max_steps, t, passes, now, v, p)
        return each(advance)(now, vector, product, tolerance)

    loop = Loop(init, body, lambda now: jnp.any(now.is_live))
    end = batching.solve(loop, inputs)
    x = each(_moved)(end)
    residual = scaled - mv(x.astype(vector_dtype)).astype(dtype)
    norm = each(two_norm)(residual)
    return Krylov(x * scale, norm * unit.astype(norm.dtype), end.num_steps)
