"""The steps of a reversible solve, undone one by one with their cotangents."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from .._batching import AbstractBatching, Loop
from .._dtype import at_least_single, real
from .._misc import difference, per_sample, tree_allfinite, tree_where
from .._norm import divisor, measured
from .._solver import Reversible, Way


# Iterates that are larger than any of the solve, this many times, are none of its own.
_RANGE = 2


class _Undone(eqx.Module):
    # At step `k`, of which `num_left` is one more: `y_k` and `y_{k+1}`, their
    # cotangents, whether the iterates have been lost, and if so to where `fn` is not
    # finite.
    y: PyTree[Array]
    new_y: PyTree[Array]
    ct_y: PyTree[Array]
    ct_new_y: PyTree[Array]
    num_left: Int[Array, "..."]
    is_lost: Bool[Array, "..."]
    is_outside: Bool[Array, "..."]


class Start(eqx.Module):
    """Where the way back ends.

    **Attributes:**

    - `ct_start`, `ct_before`: The cotangents of the two iterates that a solve starts
        from, in at least single precision. Zero where they were not reached.
    - `ct_params`: That of the parameters.
    - `num_steps`: The steps that were undone.
    - `error`: An estimate of the error of all these, relative to the cotangent of the
        value.
    - `is_lost`: Whether the iterates left the range of those of the solve, or the
        domain of `fn`. The steps before that were not undone.
    - `is_outside`: Whether it was the domain.
    """

    ct_start: PyTree[Array]
    ct_before: PyTree[Array]
    ct_params: PyTree[Array]
    num_steps: Int[Array, "..."]
    error: Float[Array, "..."]
    is_lost: Bool[Array, "..."]
    is_outside: Bool[Array, "..."]


def wide(tree: PyTree[Array]) -> PyTree[Array]:
    """Cotangents as they are added up: in at least single precision."""
    return jtu.tree_map(lambda x: x.astype(at_least_single(x.dtype)), tree)


def _scaled(factor, tree: PyTree[Array]) -> PyTree[Array]:
    def scale(x):
        return jnp.asarray(factor, real(x.dtype)).astype(x.dtype) * x

    return jtu.tree_map(scale, tree)


def _add(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda x, y: x + y.astype(x.dtype), a, b)


def _size(solver: Reversible, tree: PyTree[Array]) -> Scalar:
    return measured(solver.norm, tree, solver.axis_name)


def _is_live(now: _Undone) -> Bool[Array, "..."]:
    return (now.num_left > 0) & ~now.is_lost


def _seed(solver: Reversible, now: _Undone, f: PyTree[Array]) -> PyTree[Array]:
    """The cotangent of `f`, the image of `now.y`."""
    seed = _scaled(solver.beta, now.ct_new_y)
    zero = jtu.tree_map(jnp.zeros_like, seed)
    seed = tree_where(_is_live(now) & tree_allfinite(f, solver.axis_name), seed, zero)
    return jtu.tree_map(lambda s, f: s.astype(f.dtype), seed, f)


def _undo(
    solver: Reversible, way: Way, now: _Undone, f: PyTree[Array], ct: PyTree[Array]
) -> _Undone:
    """One step of one problem, with the image `f` and what comes back through `fn`."""
    is_live = _is_live(now)
    is_undone = is_live & tree_allfinite(f, solver.axis_name)
    old = solver.reverse(f, now.new_y)
    # Nothing is evaluated at the iterate before the start. Not a number is no less.
    is_far = (now.num_left > 1) & ~(_size(solver, old) <= _RANGE * way.size)
    is_lost = is_live & (~is_undone | is_far)
    is_moved = is_undone & (now.num_left > 1) & ~is_far
    # One that has ended is still evaluated in a batch: stay where that does no harm.
    y, new_y = tree_where(is_moved, (old, now.y), (now.y, now.new_y))
    y = tree_where(is_lost, way.previous, y)
    cts = (_scaled(1 - solver.beta, now.ct_new_y), _add(now.ct_y, ct))
    ct_y, ct_new_y = tree_where(is_undone, cts, (now.ct_y, now.ct_new_y))
    num_left = now.num_left - is_undone.astype(jnp.int32)
    return _Undone(
        y,
        new_y,
        ct_y,
        ct_new_y,
        num_left,
        now.is_lost | is_lost,
        now.is_outside | (is_live & ~is_undone),
    )


def _error(solver: Reversible, y0, y, way: Way, ct, end: _Undone) -> Float[Array, ""]:
    """How far from the start it ended, times how much of the cotangent came there.

    An error of the iterates and the cotangent that meets it grow, or fall, by factors
    whose product is at least one a step: what is lost is about what the last one loses.
    """
    dtype = way.size.dtype
    distance = _size(solver, difference(y0, end.y)).astype(dtype)
    distance = jnp.where(end.is_lost, way.size, distance)
    distance = jnp.where(way.num_steps > 0, distance, 0)
    drift = distance / divisor(_size(solver, y).astype(dtype))
    left = jnp.maximum(_size(solver, end.ct_y), _size(solver, end.ct_new_y))
    share = (left / divisor(_size(solver, ct))).astype(dtype)
    return drift * jnp.where(jnp.isfinite(share), share, 1)


def go_back(
    fn: Callable[[PyTree[Array], PyTree[Any]], PyTree[Array]],
    params: PyTree[Any],
    solver: Reversible,
    y0: PyTree[Array],
    y: PyTree[Array],
    way: Way,
    ct: PyTree[Array],
    *,
    is_wanted: Bool[Array, "..."],
    batching: AbstractBatching,
    is_batch: bool,
) -> Start:
    """From the value of a solve back to its start.

    **Arguments:**

    - `fn`: Maps `(y, params)` to a tree like `y`. Captures no arrays.
    - `params`: A pair of trees, of which the first is differentiated.
    - `y`, `way`: What the solve returned, and how it was reached.
    - `ct`: The cotangent of `y`, in at least single precision.
    - `is_wanted`: Whether a sample goes back at all.
    """
    each = per_sample(is_batch)
    inputs, static = eqx.partition(
        (params, solver, y, way, ct, is_wanted), eqx.is_array
    )

    def init(inputs):
        (moving, _), _, y, way, ct, is_wanted = inputs
        zero, zero_params = jtu.tree_map(jnp.zeros_like, (ct, wide(moving)))
        num_left = jnp.where(is_wanted, way.num_steps, 0)
        lost = jnp.zeros_like(is_wanted)
        return _Undone(way.previous, y, zero, ct, num_left, lost, lost), zero_params

    def body(_, now, inputs):
        (moving, fixed), solver, _, way, *_ = eqx.combine(inputs, static)
        undone, ct_params = now
        at = lambda y, moving: fn(y, (moving, fixed))
        f, pull = jax.vjp(at, undone.y, moving)
        ct_y, ct = pull(each(ft.partial(_seed, solver))(undone, f))
        # Of no sample that has ended, and if all have, no change whatsoever.
        is_any = jnp.any(
            _is_live(undone) & each(lambda f: tree_allfinite(f, solver.axis_name))(f)
        )
        ct_params = tree_where(is_any, _add(ct_params, ct), ct_params)
        return each(ft.partial(_undo, solver))(way, undone, f, ct_y), ct_params

    loop = Loop(init, body, lambda now: jnp.any(_is_live(now[0])))
    end, ct_params = batching.solve(loop, inputs)
    error = each(ft.partial(_error, solver))(y0, y, way, ct, end)
    zero = jtu.tree_map(jnp.zeros_like, ct)
    cts = each(tree_where)(end.is_lost, (zero, zero), (end.ct_new_y, end.ct_y))
    num_steps = jnp.where(is_wanted, way.num_steps - end.num_left, 0)
    return Start(
        cts[0], cts[1], ct_params, num_steps, error, end.is_lost, end.is_outside
    )
