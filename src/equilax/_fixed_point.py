import dataclasses
import functools as ft
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from ._adjoint import (
    AbstractAdjoint,
    AdjointMonitor,
    Ended,
    ImplicitAdjoint,
    Problem,
    Run,
)
from ._axis_names import check_axis_names
from ._batching import AbstractBatching, Staged
from ._check import check_callable, check_data
from ._custom_types import Args, Aux, MaybeAuxFn, Y
from ._eager import compiled_for_each
from ._failure import Kind, raise_if_failed
from ._fused import iterate_fused
from ._mesh import any_varying
from ._misc import per_sample
from ._settings import Settings
from ._solution import RESULTS, Solution
from ._solver import AbstractFixedPointSolver, check_solver_state, iterate
from ._trace import (
    as_state,
    check_batch,
    check_like,
    move,
    trace,
    ValueOf,
)


_KINDS = tuple(
    Kind(name, RESULTS[getattr(RESULTS, name)])
    for name in ("max_steps_reached", "stagnation", "divergence", "nonfinite")
)


def _check_monitor(monitor, y0, batch_axis):
    """The monitor, its solution with the batch along the first axis."""
    if monitor is None:
        return None
    for field in ("num_solves", "num_steps", "num_failed", "residual"):
        shape = jnp.shape(getattr(monitor, field))
        if shape != ():
            raise ValueError(
                f"`monitor.{field}` must be one number; got the shape {shape}. Inside "
                "`jax.vmap` there is one for each sample."
            )
    if monitor.solution is None:
        return monitor
    solution = check_like("monitor.solution", monitor.solution, y0)
    return dataclasses.replace(monitor, solution=move(solution, batch_axis, 0))


def _raise_on_failure(sol: Solution, is_batch: bool) -> Solution:
    if any_varying(sol):
        raise ValueError(
            "`throw=True` cannot raise from inside `jax.shard_map`: pass `throw=False` "
            "and read `Solution.result`, which holds the outcome of every sample."
        )
    return raise_if_failed(
        sol,
        sol.result,
        sol.result != RESULTS.successful,
        subject="The fixed-point solve",
        kinds=_KINDS,
        advice="`throw=False` returns the outcome in `Solution.result` instead.",
        num_steps=sol.stats["num_steps"],
        residual=sol.stats["residual"],
        is_batch=is_batch,
    )


def _solve(problem: Problem, run: Run | None) -> Ended:
    """Solve down to the value to be returned; see [`equilax.AbstractAdjoint`][]."""
    plain = ft.partial(
        iterate,
        problem.fn,
        problem.solver,
        problem.y0,
        problem.args,
        max_steps=problem.max_steps,
        is_batch=problem.is_batch,
        state=problem.state,
        axis_names=problem.batching.axis_names,
        run=problem.batching.solve if run is None else run,
    )
    # A kernel starts with nothing.
    is_whole = run is None and problem.state is None
    end = iterate_fused(
        problem.fused if is_whole else None,
        problem.solver,
        problem.y0,
        max_steps=problem.max_steps,
        iterate=plain,
    )
    # Here, so that derivatives are those at the value that is returned.
    is_successful = end.result == RESULTS.successful
    y, residual, stats = per_sample(problem.is_batch)(problem.solver.postprocess)(
        end.y, end.residual, is_successful, end.state
    )
    return eqx.tree_at(lambda e: (e.y, e.residual), end, (y, residual)), stats


@compiled_for_each
def _fixed_point(fn, y0, args, settings: Settings) -> Solution:
    has_aux, batch_axis = settings.has_aux, settings.batch_axis
    is_batch = batch_axis is not None
    y0 = as_state(y0)
    check_batch(y0, batch_axis)
    monitor = _check_monitor(settings.monitor, y0, batch_axis)
    hoisted, state0 = trace(fn, y0, args, has_aux, batch_axis)
    solver, state, max_steps = settings.solver, settings.state, settings.max_steps
    batching = check_axis_names(hoisted, solver, state0, settings.batching)
    if state is not None:
        check_solver_state(solver, state0, state, max_steps, per_sample(is_batch))
    problem = Problem(
        ValueOf(hoisted),
        solver,
        state0,
        args,
        state,
        monitor,
        batching,
        settings.tags,
        max_steps,
        settings.throw,
        is_batch,
        settings.fuse,
    )
    end, stats = settings.adjoint.apply(_solve, problem)
    # The derivative of `aux` runs through `value` and through `fn` here.
    aux = hoisted(end.y, args)[1] if has_aux else None
    stats = {
        "num_steps": end.num_steps,
        "num_fn_evals": end.num_fn_evals + int(has_aux),
        "max_steps": max_steps,
        "residual": end.residual,
        **stats,
    }
    value = move(end.y, 0, batch_axis)
    sol = Solution(value, end.result, aux, stats, end.state)
    return _raise_on_failure(sol, is_batch) if settings.throw else sol


def solve(fn, y0, args, settings: Settings) -> Solution:
    """As [`equilax.fixed_point`][], by `settings`."""
    settings.check()
    return _fixed_point(fn, y0, args, settings)


def fixed_point(
    fn: MaybeAuxFn[Y, Aux],
    solver: AbstractFixedPointSolver,
    y0: Y,
    args: Args = None,
    *,
    has_aux: bool = False,
    max_steps: int = 256,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),  # noqa: B008
    batching: AbstractBatching = Staged(),  # noqa: B008
    throw: bool = True,
    tags: frozenset[object] = frozenset(),
    batch_axis: int | None = None,
    state: PyTree[Any] = None,
    monitor: AdjointMonitor | None = None,
) -> Solution[Y, Aux]:
    r"""Find a `y` such that `fn(y, args) == y`.

    Converged means $\| (f(y) - y) / (\mathrm{atol} + \mathrm{rtol} |y|) \| < 1$ in the
    solver's norm, at the `y` that is returned.

    Under `jax.vmap`, nested or not, all samples run as one batch, and each has its own
    status, step count and residual. A finished sample is frozen, and none can change
    the value of another, be it slow, divergent or not-a-number.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a pytree with the structure, shapes and dtypes of `y`.
        Any callable; derivatives reach `args` and whatever it closes over. Traced once:
        a call outside of `jax.jit` is compiled, and kept for the next call with an
        equal `fn` for as long as there is such a one. What changes belongs into `args`,
        or into a function defined anew, not into a global variable.
    - `solver`: A fixed-point solver, such as [`equilax.Anderson`][].
    - `y0`: The initial guess: a pytree of floating-point or complex arrays.
    - `args`: Passed to `fn`. Any pytree; what is not an array stays as it is.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.
    - `max_steps`: The most steps to take. Keyword only argument.
    - `adjoint`: How to differentiate the solve. Keyword only argument.
    - `batching`: How the solve runs under `jax.vmap`. Keyword only argument.
    - `throw`: Whether a failed solve raises. If not, `Solution.result` says how it
        ended. With `throw=False` the compiled program holds no host callback. Keyword
        only argument.
    - `tags`: Lineax tags that the Jacobian of `y - fn(y, args)` with respect to `y`
        has, for a Lineax solver of the adjoint. Keyword only argument.
    - `batch_axis`: The axis of the leaves of `y0` along which they are a batch, for an
        `fn` that takes the whole of it in one call. Each sample then has its own
        residual, history, status and step count as under `jax.vmap`, but `fn` is
        evaluated on all of them until the last has stopped. They must not depend on
        each other. `None` is a lone problem. Keyword only argument.
    - `state`: The `Solution.state` of an earlier solve by the same solver, to go on
        with what that one learnt of `fn`: from its `value` as `y0`, or for a problem
        next to it. Its derivative is zero, like that of `y0`. Keyword only argument.
    - `monitor`: An [`equilax.AdjointMonitor`][], whose gradient tells how the backward
        pass went. Keyword only argument.

    **Returns:**

    An [`equilax.Solution`][].

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.
    - `EquinoxRuntimeError`: At run time, if the solve fails and `throw` is `True`.

    Cost: an evaluation of `fn` more than the solver takes steps, and another one for
    `aux`. Memory: that of the solver, and three times `y`.
    """
    check_callable("fn", fn, "fn(y, args)")
    check_data(y0=y0, args=args)
    settings = Settings(
        solver,
        max_steps,
        adjoint,
        batching,
        throw,
        state,
        monitor,
        has_aux=has_aux,
        tags=tags,
        batch_axis=batch_axis,
    )
    return solve(fn, y0, args, settings)
