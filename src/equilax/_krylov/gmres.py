"""GMRES in products alone, batched and sharded as any other loop of the library."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Scalar

from .._batching import AbstractBatching, Loop
from .._custom_types import AxisName, BoolScalar, IntScalar
from .._dtype import at_least_single
from .._mesh import any_varying, num_parts, vary_over
from .._misc import hoist, per_sample, tree_where
from .._norm import divisor, two_norm
from .cycle import Cycle, moved, orthogonalise, rotate, start


# A cycle that leaves more than this of the residual has stagnated.
_NO_GAIN = 0.99


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


def _advance(
    max_steps: int,
    axis_name: AxisName,
    tolerance: Scalar,
    passes: IntScalar,
    now: Cycle,
    vector,
    product,
) -> Cycle:
    """One pass: a vector more in the basis, or the residual with which it begins anew.

    A cycle has a pass for each of `restart` vectors and one more, in which the residual
    of what has been found is evaluated. That is the same for all samples of a batch, so
    that the slot of the basis that is written is one number.
    """
    size = now.triangle.shape[0]
    column = passes % (size + 1)
    is_new_cycle = column == size
    fresh, entries = orthogonalise(now.basis, column, product, axis_name)
    fresh = jnp.where(is_new_cycle, vector - product, fresh)
    norm = two_norm(fresh, axis_name).astype(fresh.dtype)
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
    grown = (*rotate(now, column, entries, norm), now.num_filled + 1, now.at_restart)
    changed = tree_where(is_new_cycle, begun, grown)
    triangle, rotation, rhs, estimate, num_filled, at_restart = changed
    num_steps = now.num_steps + 1
    is_stuck = is_new_cycle & (norm > _NO_GAIN * now.at_restart)
    # Also false where the estimate is not a number.
    is_live = (estimate > tolerance) & (num_steps < max_steps) & ~is_stuck
    new = Cycle(
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


def _close_cycle(now: Cycle, is_end: BoolScalar) -> Cycle:
    """Add to `x` what this cycle has found, at its end."""
    # A sample that has stopped does so after the loop. The pass that follows empties
    # the basis.
    x = vary_over(now.x, any_varying(now))
    x = lax.cond(
        is_end,
        lambda now, x: jnp.where(now.is_live, moved(now), x),
        lambda _, x: x,
        now,
        x,
    )
    return eqx.tree_at(lambda c: c.x, now, x)


def gmres(
    mv: Callable[[Array], Array],
    vector: Float[Array, "..."],
    *,
    tolerance: Float[Array, "..."],
    restart: int,
    max_steps: int,
    batching: AbstractBatching,
    is_batch: bool = False,
    axis_name: AxisName = None,
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
    - `axis_name`: The mesh axes along which `vector` is split.

    Cost: a product a step, `4 * restart` passes through `vector`. Memory: `restart + 3`
    times `vector`. Along an `axis_name` three all-reduces a step.
    """
    each = per_sample(is_batch)
    dtype = at_least_single(vector.dtype)
    unit = each(lambda v: divisor(two_norm(v, axis_name)))(vector).astype(dtype)
    scale = unit[..., None] if is_batch else unit
    vector_dtype = vector.dtype
    scaled = vector.astype(dtype) / scale
    inputs, static = eqx.partition(
        (hoist(mv, vector), scaled, tolerance.astype(dtype)), eqx.is_array
    )
    size = max(1, min(restart, num_parts(axis_name) * vector.shape[-1]))

    def init(inputs):
        _, vector, tolerance = eqx.combine(inputs, static)
        return each(ft.partial(start, size, axis_name))(vector, tolerance)

    def body(passes, now, inputs):
        mv, vector, tolerance = eqx.combine(inputs, static)
        column = passes % (size + 1)

        def choose(now):
            slot = jnp.minimum(column, size)
            row = lax.dynamic_index_in_dim(now.basis, slot, 0, keepdims=False)
            return jnp.where(column == size, now.x, row)

        product = mv(each(choose)(now).astype(vector_dtype)).astype(dtype)
        advance = lambda now, v, p, t: _advance(
            max_steps, axis_name, t, passes, now, v, p
        )
        return each(advance)(now, vector, product, tolerance)

    loop = Loop(init, body, lambda now: jnp.any(now.is_live))
    end = batching.solve(loop, inputs)
    x = each(moved)(end)
    residual = scaled - mv(x.astype(vector_dtype)).astype(dtype)
    norm = each(lambda v: two_norm(v, axis_name))(residual)
    return Krylov(x * scale, norm * unit.astype(norm.dtype), end.num_steps)
