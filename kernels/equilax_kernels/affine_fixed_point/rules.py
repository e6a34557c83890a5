"""How the rows of a solve are judged: common to the reference and all backends.

A column is an array of the shape `[rows, 1]`, which a kernel broadcasts over features
without a change of layout.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .activations import Activation


# Of an iterate that fails. The figures are those of `equilax.RESULTS`.
_DIVERGED = 1e8
_PATIENCE_AT_ROUNDING = 30
_PATIENCE = 1000
_ROUNDING_UNITS = 8
_RUNNING = -1


class Status(enum.IntEnum):
    """How the solve of a row ended."""

    SUCCESSFUL = 0
    MAX_STEPS_REACHED = 1
    NONFINITE = 2
    DIVERGENCE = 3
    STAGNATION = 4


class Settings(NamedTuple):
    """What is known when a kernel is built."""

    activation: Activation
    max_steps: int
    history_length: int
    is_damped: bool
    precision: Any


class Knobs(NamedTuple):
    """What may be traced: scalars."""

    rtol: Array
    atol: Array
    damp: Array
    ridge: Array
    safeguard: Array


def as_knobs(dtype: Any, rtol: Any, atol: Any, *others: Any) -> Knobs:
    """Scalars of one dtype. A tolerance below zero is one that nothing reaches."""
    knobs = Knobs(*(jnp.asarray(x, dtype) for x in (rtol, atol, *others)))
    rtol, atol = (jnp.where(x < 0, jnp.nan, x) for x in knobs[:2])
    return knobs._replace(rtol=rtol, atol=atol)


class Rows(NamedTuple):
    """How far each row has come."""

    z: Float[Array, "rows d"]
    best: Float[Array, "rows d"]
    status: Int[Array, "rows 1"]
    num_steps: Int[Array, "rows 1"]
    residual: Float[Array, "rows 1"]
    first_residual: Float[Array, "rows 1"]
    best_residual: Float[Array, "rows 1"]
    best_step: Int[Array, "rows 1"]
    is_trial: Int[Array, "rows 1"]


class Evaluation(NamedTuple):
    """What a step starts from: the iterates, their images, and how they were judged.

    `num_steps` is that of all rows that have not ended.
    """

    z: Float[Array, "rows d"]
    f: Float[Array, "rows d"]
    residual: Float[Array, "rows 1"]
    is_finite: Bool[Array, "rows 1"]
    is_trial: Bool[Array, "rows 1"]
    num_steps: Int[Array, ""]


def image(
    z: Float[Array, "rows d"],
    weight: Float[Array, "d d"],
    u: Float[Array, "rows d"],
    scale: Float[Array, "rows d"] | None,
    activation: Callable[[Array], Array],
    precision: Any,
    dtype: Any,
) -> Float[Array, "rows d"]:
    """The map, added up in `dtype` and rounded to that of `z`."""
    if scale is not None:
        z = (z.astype(dtype) * scale.astype(dtype)).astype(z.dtype)
    product = lax.dot_general(
        z,
        weight,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )
    f = activation(product + u.astype(dtype))
    return f.astype(z.dtype).astype(dtype)


def largest(x: Float[Array, "rows d"]) -> Float[Array, "rows 1"]:
    """The maximum of what is not negative: zero where there are no features."""
    if x.shape[1] == 0:
        return jnp.zeros((x.shape[0], 1), x.dtype)
    return jnp.max(x, axis=1, keepdims=True)


def start(
    z0: Float[Array, "rows d"], is_row: Bool[Array, "rows 1"], dtype: Any
) -> Rows:
    """All at step zero. What only fills up a tile has ended before it starts."""
    zero = jnp.zeros(is_row.shape, jnp.int32)
    inf = jnp.full(is_row.shape, jnp.inf, dtype)
    status = jnp.where(is_row, jnp.int32(_RUNNING), jnp.int32(Status.SUCCESSFUL))
    return Rows(z0, z0, status, zero, inf, inf, inf, zero, zero)


def is_live(rows: Rows) -> Bool[Array, "rows 1"]:
    return rows.status == _RUNNING


def any_live(rows: Rows) -> Bool[Array, ""]:
    return jnp.min(rows.status) == _RUNNING


def _measure(z, f, knobs: Knobs):
    """The residual, infinite if it is not a number; if it is too large; the size."""
    # Some backends drop a NaN from a maximum, so none may get there.
    moved = jnp.abs(f - z)
    moved = jnp.where(moved <= jnp.finfo(moved.dtype).max, moved, jnp.inf)
    size = jnp.abs(z)
    # So that a tolerance that is not a number is never reached.
    is_far = ~(moved < knobs.atol + knobs.rtol * size) & (moved > 0)
    return largest(moved), largest(is_far.astype(moved.dtype)) > 0, largest(size)


def judge(
    rows: Rows,
    z: Float[Array, "rows d"],
    f: Float[Array, "rows d"],
    num_steps: Int[Array, ""],
    knobs: Knobs,
    max_steps: int,
) -> tuple[Rows, Evaluation]:
    """Test the iterates `z`, with images `f`, both widened for the arithmetic."""
    residual, is_far, size = _measure(z, f, knobs)
    is_finite = residual <= jnp.finfo(residual.dtype).max
    is_trial = rows.is_trial > 0
    live = is_live(rows)
    is_best = residual < rows.best_residual
    first = jnp.where(num_steps == 0, residual, rows.first_residual)
    best_step = jnp.where(is_best, num_steps, rows.best_step)

    floor = _ROUNDING_UNITS * float(jnp.finfo(rows.z.dtype).eps) * size
    patience = jnp.where(
        residual <= floor, jnp.int32(_PATIENCE_AT_ROUNDING), jnp.int32(_PATIENCE)
    )
    is_budget = (knobs.rtol == 0) & (knobs.atol == 0)
    diverged = (residual > _DIVERGED * first) & ~is_trial & ~is_budget
    stagnated = (num_steps - best_step >= patience) & ~is_budget
    is_lost = ~is_finite & ~is_trial

    # Later lines win.
    status = jnp.where(is_budget, jnp.int32(0), jnp.int32(Status.MAX_STEPS_REACHED))
    status = jnp.where(stagnated, jnp.int32(Status.STAGNATION), status)
    status = jnp.where(diverged, jnp.int32(Status.DIVERGENCE), status)
    status = jnp.where(is_far, status, jnp.int32(Status.SUCCESSFUL))
    # The steps of a budget are not taken back once they are over.
    is_failed = is_lost | (~is_finite & is_budget)
    status = jnp.where(is_failed, jnp.int32(Status.NONFINITE), status)
    stop = ~is_far | is_lost | diverged | stagnated | (num_steps >= max_steps)

    keep = lambda new, old: jnp.where(live, new, old)
    seen = rows._replace(
        # Of equals the last, which has come further.
        best=jnp.where(live & (residual <= rows.best_residual), rows.z, rows.best),
        status=keep(jnp.where(stop, status, jnp.int32(_RUNNING)), rows.status),
        residual=keep(residual, rows.residual),
        first_residual=keep(first, rows.first_residual),
        best_residual=keep(
            jnp.where(is_best, residual, rows.best_residual), rows.best_residual
        ),
        best_step=keep(best_step, rows.best_step),
    )
    return seen, Evaluation(z, f, residual, is_finite, is_trial, num_steps)


def damped(at: Evaluation, knobs: Knobs, memory: Any):
    """The step of the damped iteration; see [`advance`][] on its signature."""
    z = (1 - knobs.damp) * at.f + knobs.damp * at.z
    return z, jnp.zeros(at.residual.shape, jnp.int32), memory


def advance(
    rows: Rows,
    memory: Any,
    num_steps: Int[Array, ""],
    fn: Callable[[Array], Array],
    step: Callable[[Evaluation, Knobs, Any], tuple[Array, Array, Any]],
    knobs: Knobs,
    max_steps: int,
) -> tuple[Rows, Any]:
    """Evaluate, judge, and move the rows that go on.

    **Arguments:**

    - `fn`: Maps the iterates to their images, as [`image`][] does.
    - `step`: Maps an evaluation and a memory to the next iterates, whether they are
        trials, and the next memory, which is of no use to rows that have ended.
    """
    f = fn(rows.z)
    seen, at = judge(rows, rows.z.astype(f.dtype), f, num_steps, knobs, max_steps)
    z, is_trial, memory = step(at, knobs, memory)
    proceed = is_live(seen)
    return seen._replace(
        z=jnp.where(proceed, z.astype(rows.z.dtype), rows.z),
        num_steps=rows.num_steps + proceed.astype(jnp.int32),
        is_trial=is_trial,
    ), memory


def finish(rows: Rows) -> tuple[Float[Array, "rows d"], Float[Array, "rows 1"]]:
    """The value and its residual: of a solve that failed, those of its best iterate."""
    dtype = rows.residual.dtype
    is_big = ~(jnp.abs(rows.z.astype(dtype)) <= jnp.finfo(dtype).max)
    is_whole = largest(is_big.astype(dtype)) == 0
    is_last = (rows.status == 0) | (rows.status == int(Status.NONFINITE))
    # Where no residual was ever finite there is no best.
    is_last = (is_last & is_whole) | (rows.best_residual == jnp.inf)
    z = jnp.where(is_last, rows.z, rows.best)
    return z, jnp.where(is_last, rows.residual, rows.best_residual)
