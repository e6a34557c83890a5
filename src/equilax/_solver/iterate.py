"""The loop that every solver runs in, and the only place that judges an iterate."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._batching import Loop
from .._custom_types import Args, AxisName, BoolScalar, IntScalar, Y
from .._dtype import residual_dtype, rounding
from .._misc import per_sample, tree_allfinite, tree_where
from .._solution import RESULTS
from .base import AbstractFixedPointSolver, Evaluation
from .judge import judge, Judged
from .progress import Progress
from .tolerance import is_budget_of


# The figures of the docstring of `RESULTS`.
_DIVERGED = 1e8
_PATIENCE_AT_ROUNDING = 30
_PATIENCE = 1000
# A residual is a difference of two numbers of the size of `y`, one of them the result
# of many operations: at this many units in the last place it holds no information.
_ROUNDING_UNITS = 8


def _verdict(
    solver: AbstractFixedPointSolver,
    y: Y,
    judged: Judged,
    now: Progress[Y],
    max_steps: int,
) -> tuple[BoolScalar, RESULTS]:
    """Whether to stop here, and with which result."""
    floor = _ROUNDING_UNITS * rounding(y) * judged.size
    patience = jnp.where(now.residual <= floor, _PATIENCE_AT_ROUNDING, _PATIENCE)
    is_budget = is_budget_of(solver.rtol, solver.atol)
    converged = judged.is_within
    diverged = (now.residual > _DIVERGED * now.first_residual) & ~now.is_trial
    stagnated = now.num_steps - now.best_step >= patience
    ran_out = now.is_last | (now.num_steps >= max_steps)

    # Later lines win.
    result = RESULTS.where(is_budget, RESULTS.successful, RESULTS.max_steps_reached)
    result = RESULTS.where(stagnated & ~is_budget, RESULTS.stagnation, result)
    result = RESULTS.where(diverged & ~is_budget, RESULTS.divergence, result)
    result = RESULTS.where(converged, RESULTS.successful, result)
    # The steps of a budget are not taken back once they are over.
    is_lost = ~judged.is_finite & (~now.is_trial | is_budget)
    result = RESULTS.where(is_lost, RESULTS.nonfinite, result)
    is_lost = is_lost & ~now.is_trial
    gave_up = (diverged | stagnated) & ~is_budget
    return converged | is_lost | gave_up | ran_out, result


def _start(
    solver: AbstractFixedPointSolver, max_steps: int, y0: Y, state: PyTree[Any]
) -> Progress[Y]:
    inf = jnp.array(jnp.inf, residual_dtype(y0))
    zero = jnp.zeros((), jnp.int32)
    return Progress(
        y=y0,
        state=solver.init(y0, max_steps=max_steps, state=state),
        result=RESULTS.successful,
        is_live=jnp.array(True),
        num_steps=zero,
        num_fn_evals=zero,
        residual=inf,
        first_residual=inf,
        best_residual=inf,
        best_step=zero,
        best_y=y0,
        is_trial=jnp.array(False),
        is_last=jnp.array(False),
    )


def _freeze(now: Progress[Y], new: Progress[Y]) -> Progress[Y]:
    """What nothing else keeps as it was when the solve has ended."""
    scalars = lambda p: (
        p.result,
        p.num_fn_evals,
        p.residual,
        p.first_residual,
        p.best_residual,
        p.best_step,
    )
    frozen = tree_where(now.is_live, scalars(new), scalars(now))
    return eqx.tree_at(scalars, new, frozen)


def _advance(
    solver: AbstractFixedPointSolver,
    fn: Callable[[Y, Args], Y],
    args: Args,
    num_steps: IntScalar,
    max_steps: int,
    axis_names: frozenset[str],
    now: Progress[Y],
    f: Y,
) -> Progress[Y]:
    """One pass of one problem, at whose iterate `fn` has been evaluated to `f`."""
    # The judgement has no derivative, also where the loop is differentiated.
    y, f_seen = jax.lax.stop_gradient((now.y, f))
    judged = judge(solver, y, f_seen)
    is_best = judged.residual < now.best_residual
    seen = dataclasses.replace(
        now,
        residual=judged.residual,
        first_residual=jnp.where(
            now.num_steps == 0, judged.residual, now.first_residual
        ),
        best_residual=jnp.where(is_best, judged.residual, now.best_residual),
        best_step=jnp.where(is_best, now.num_steps, now.best_step),
    )
    stop, result = _verdict(solver, y, judged, seen, max_steps)
    if axis_names:  # What is frozen would not follow the others any more.
        stop = jax.lax.pmin(stop.astype(jnp.int32), tuple(axis_names)) > 0
    proceed = now.is_live & ~stop
    # Of equals the last, which has come further.
    is_best_y = now.is_live & (judged.residual <= now.best_residual)
    best_y = tree_where(is_best_y, now.y, now.best_y)
    step = solver.step(
        fn,
        Evaluation(
            now.y,
            f,
            judged.residual,
            judged.scaled,
            judged.size,
            best_y,
            seen.best_residual,
            num_steps,
            now.is_live,
            proceed,
            now.is_trial,
            judged.is_finite,
        ),
        args,
        now.state,
    )
    num_evals = jnp.where(proceed, jnp.asarray(step.num_evals, jnp.int32), 0)
    new = dataclasses.replace(
        seen,
        y=tree_where(proceed, step.y, now.y),
        best_y=best_y,
        state=step.state,
        result=RESULTS.where(stop, result, now.result),
        is_live=proceed,
        num_steps=now.num_steps + proceed.astype(jnp.int32),
        num_fn_evals=now.num_fn_evals + 1 + num_evals,
        is_trial=jnp.asarray(step.is_trial),
        is_last=jnp.asarray(step.is_last),
    )
    return _freeze(now, new)


def _best_on_failure(axis_name: AxisName, end: Progress[Y]) -> Progress[Y]:
    """The best iterate of a solve that failed, or the last before `fn` went astray."""
    is_last = (end.result == RESULTS.successful) | (end.result == RESULTS.nonfinite)
    is_last = is_last & tree_allfinite(end.y, axis_name)
    # Where no residual was ever finite there is no best.
    is_last = is_last | jnp.isinf(end.best_residual)
    last, best = (end.y, end.residual), (end.best_y, end.best_residual)
    y, residual = tree_where(is_last, last, best)
    return dataclasses.replace(end, y=y, residual=residual)


def _refuse(solver: AbstractFixedPointSolver) -> Callable:
    def fn(y, args):
        raise ValueError(
            f"`solver={type(solver).__name__}` evaluates `fn` on one sample alone, "
            "which an `fn` of the whole batch (`batch_axis`) does not allow."
        )

    return fn


def make_loop(
    static: Any,
    *,
    max_steps: int,
    is_batch: bool,
    axis_names: frozenset[str] = frozenset(),
) -> Loop:
    """The loop for one problem.

    Its inputs are the arrays of `(fn, solver, y0, args, state)`.

    **Arguments:**

    - `static`: What is left of `(fn, solver, y0, args, state)` without its arrays.
    - `is_batch`: Whether `y0` is a batch that `fn` takes as one. Each sample is judged
        and moved by itself all the same.
    - `axis_names`: The vmapped axes along which samples depend on each other.
    """
    each = per_sample(is_batch)

    def init(inputs) -> Progress:
        _, solver, y0, _, state = eqx.combine(inputs, static)
        return each(ft.partial(_start, solver, max_steps))(y0, state)

    def body(num_steps, now: Progress, inputs) -> Progress:
        fn, solver, _, args, _ = eqx.combine(inputs, static)
        f = fn(now.y, args)
        inner = _refuse(solver) if is_batch else fn
        advance = ft.partial(
            _advance, solver, inner, args, num_steps, max_steps, axis_names
        )
        return each(advance)(now, f)

    return Loop(init, body, lambda now: jnp.any(now.is_live))


def iterate(
    fn: Callable[[Y, Args], Y],
    solver: AbstractFixedPointSolver,
    y0: Y,
    args: Args,
    *,
    max_steps: int,
    is_batch: bool = False,
    state: PyTree[Any] = None,
    axis_names: frozenset[str] = frozenset(),
    run: Callable[[Loop, PyTree[Any]], Progress[Y]],
) -> Progress[Y]:
    """Iterate `solver` on `fn` from `y0` until it stops.

    In what is returned `y` and `residual` are those to report.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a tree like `y`. A pytree, all of whose arrays are
        leaves: see [`equilax._misc.hoist`][].
    - `is_batch`: Whether `y0` is a batch, along the first axis, that `fn` takes as one.
    - `state`: That in which an earlier solve ended, or `None`.
    - `axis_names`: The vmapped axes along which samples depend on each other.
    - `run`: Runs a [`equilax._batching.Loop`][] on its inputs: the `solve` of a
        batching strategy, or a loop that can be differentiated.
    """
    problem = (fn, solver, y0, args, state)
    inputs, static = eqx.partition(problem, eqx.is_array)
    loop = make_loop(
        static, max_steps=max_steps, is_batch=is_batch, axis_names=axis_names
    )
    best_on_failure = ft.partial(_best_on_failure, solver.axis_name)
    return per_sample(is_batch)(best_on_failure)(run(loop, inputs))
