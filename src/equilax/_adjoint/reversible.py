import dataclasses
from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, PyTree

from .._check import check_instance, check_nonnegative
from .._custom_types import RealScalarLike
from .._failure import Kind, raise_if_failed
from .._misc import per_sample, tree_allfinite, tree_where
from .._solver import Reversible, Way
from .base import AbstractAdjoint, Ended, Problem
from .monitor import AdjointMonitor, figures
from .on_failure import OnFailure
from .separate import separate
from .transposed import as_cotangents
from .way_back import go_back, Start, wide


_KINDS = (
    Kind(
        "",
        "Its reconstruction has drifted: rounding errors grow with every step undone, "
        "and the start at which they ended is not the one of the solve. Take fewer "
        "steps, a smaller `beta`, float64, or `equilax.RecursiveCheckpointAdjoint`, "
        "which keeps iterates in place of reconstructing them.",
    ),
)


class ReversibleAdjoint(AbstractAdjoint):
    r"""Backpropagate through the steps of [`equilax.Reversible`][] by undoing them.

    From the last two iterates the others are made again, one by one backwards, and with
    them the cotangents $\bar{y}_k$ (McCallum, Arora and Foster 2025, arXiv 2509.12917):

    $y_{k-1} = (y_{k+1} - \beta f(y_k)) / (1 - \beta), \qquad
    \bar{f} = \beta \bar{y}_{k+1}, \quad
    \bar{y}_k \mathrel{+}= (\partial f / \partial y)^T \bar{f}, \quad
    \bar{\theta} \mathrel{+}= (\partial f / \partial \theta)^T \bar{f}, \quad
    \bar{y}_{k-1} = (1 - \beta) \bar{y}_{k+1}$

    The derivative is that of the steps that led to the value, as of
    [`equilax.RecursiveCheckpointAdjoint`][], the dependence on `y0` included, and that
    of a solve that failed as well. A `state` that was handed in and the fields of the
    solver have the derivative zero, and so have `stats` and the `state` returned.

    Rounding errors grow by up to $1 / (1 - \beta)$ with each step undone, while the
    cotangent that meets them shrinks. The distance at which the way back misses `y0`,
    relative to the value, times the part of the cotangent that came so far, is an
    estimate of the error of the gradient, at hand for nothing. Where the iterates leave
    the range of those of the solve they are lost, and the way back ends: what is left
    of the cotangent is what the gradient lacks, as if backpropagation had been
    truncated there. Above `max_error` it has failed, which is never silent: it raises
    with `throw=True`, and otherwise meets with `on_failure`. The derivative with
    respect to `y0` is zero where the start was not reached.

    In an [`equilax.AdjointMonitor`][] one way back is a solve, its steps are those
    undone, and `residual` is the estimate; `solution` has no use.

    Use it to train through many steps in a memory that does not grow with them. Do not
    use it for the derivative at a solution, for which [`equilax.ImplicitAdjoint`][]
    costs less, nor in half precision, where an error of a few percent is reached after
    some eight steps at $\beta = 0.8$. Reverse mode of first order only.

    Cost: for each step undone, one evaluation of `fn` and one product with its
    transposed Jacobian. Memory: the linearisation of `fn` at one iterate, eight times
    `y` (cotangents in at least single precision) and a copy of the parameters, whatever
    the number of steps. Under `jax.vmap` that copy is one for each
    sample, also of parameters that they share; a `batch_axis` avoids it.
    """

    max_error: RealScalarLike = 1e-2
    on_failure: OnFailure = eqx.field(static=True, default=OnFailure.zero)

    def __check_init__(self):
        check_nonnegative("max_error", self.max_error)
        check_instance("on_failure", self.on_failure, OnFailure)

    def apply(self, solve, problem):
        if not isinstance(problem.solver, Reversible):
            raise TypeError(
                "`adjoint=ReversibleAdjoint()` undoes the steps of "
                "`solver=equilax.Reversible(...)`; got "
                f"`solver={type(problem.solver).__name__}`. For that one take "
                "`equilax.RecursiveCheckpointAdjoint` or `equilax.ImplicitAdjoint`."
            )
        params = (problem.fn, problem.args, problem.y0, problem.monitor)
        constants = dataclasses.replace(
            problem, fn=_absent, args=None, y0=None, monitor=None
        )
        dynamic, static = eqx.partition((constants, self), eqx.is_array)
        constants, rule = eqx.combine(lax.stop_gradient(dynamic), static)
        return _solve_reversibly(params, solve, constants, rule)


def _absent(y, args):
    del args
    return y


@eqx.filter_custom_vjp
def _solve_reversibly(params, solve, constants, rule) -> Ended:
    del rule
    problem = _problem(params, constants)
    return solve(problem, problem.batching.solve)


@_solve_reversibly.def_fwd
def _(perturbed, params, solve, constants, rule):
    del perturbed
    ended = _solve_reversibly(params, solve, constants, rule)
    return ended, (ended[0].y, ended[0].state.way)


@_solve_reversibly.def_bwd
def _(end, grad, perturbed, params, solve, constants, rule):
    del solve
    return _cotangents(rule, _problem(params, constants), end, grad[0].y, perturbed)


def _problem(params, constants: Problem) -> Problem:
    fn, args, y0, monitor = params
    return dataclasses.replace(constants, fn=fn, args=args, y0=y0, monitor=monitor)


def _evaluate(y, params):
    fn, args = eqx.combine(*params)
    return fn(y, args)


def _cotangents(
    rule: ReversibleAdjoint,
    problem: Problem,
    end: tuple[PyTree[Array], Way],
    ct: PyTree[Array | None],
    perturbed: PyTree[bool],
) -> PyTree[Array | None]:
    """Those of `fn`, `args`, `y0` and `monitor`, `None` where nobody asks for them."""
    y, way = end
    y0 = jtu.tree_map(jnp.asarray, problem.y0)  # Constants of a trace are no arrays.
    ct = wide(jtu.tree_map(lambda a, c: jnp.zeros_like(a) if c is None else c, y, ct))
    params = eqx.partition((problem.fn, problem.args), perturbed[:2])
    fn, params, pull = separate(_evaluate, y, params)

    def back(is_wanted):
        return go_back(
            fn,
            params,
            cast(Reversible, problem.solver),
            y0,
            y,
            way,
            ct,
            is_wanted=is_wanted,
            batching=problem.batching,
            is_batch=problem.is_batch,
        )

    axis_name = problem.solver.axis_name
    start = back(jnp.ones(way.num_steps.shape, bool))
    is_failed = ~(start.error <= rule.max_error)
    # A derivative outside of the domain of `fn`, with the cotangent zero.
    is_cause = start.is_outside | (start.is_lost & ~jnp.any(start.is_outside))
    is_failed = is_failed | (is_cause & ~tree_allfinite(start.ct_params, axis_name))
    found = figures(start.num_steps, is_failed, start.error, problem.is_batch)
    start = _settle(rule, problem, start, is_failed, back)
    ct_y0 = start.ct_start
    if problem.state is None:  # Else it was another solve that made the one before.
        ct_y0 = jtu.tree_map(jnp.add, ct_y0, start.ct_before)
    ct_fn, ct_args = pull(as_cotangents(start.ct_params, params[0]))
    ct_monitor = jtu.tree_map(lambda _: None, problem.monitor)
    if problem.monitor is not None:
        numbers = lambda m: (m.num_solves, m.num_steps, m.num_failed, m.residual)
        cts = as_cotangents(tuple(found), numbers(problem.monitor))
        ct_monitor = AdjointMonitor(*cts, solution=ct_monitor.solution)
    return ct_fn, ct_args, as_cotangents(ct_y0, y0), ct_monitor


def _settle(
    rule: ReversibleAdjoint,
    problem: Problem,
    start: Start,
    is_failed: Bool[Array, "..."],
    back: Callable[[Bool[Array, "..."]], Start],
) -> Start:
    """Raise if a sample failed, or let it meet with its policy.

    **Arguments:**

    - `back`: Goes back again, for those samples that are said to be wanted.
    """
    cts = lambda start: (start.ct_start, start.ct_before)
    if problem.throw:
        start = raise_if_failed(
            start,
            None,
            is_failed,
            subject="The way back through a reversible solve",
            kinds=_KINDS,
            advice="`throw=False` gives the derivative that the `on_failure` of the "
            "adjoint says, in place of this error.",
            is_batch=problem.is_batch,
        )
        return start

    axis_name = problem.solver.axis_name
    is_kept = rule.on_failure is OnFailure.keep
    other = jnp.nan if rule.on_failure is OnFailure.nan else 0.0

    def settle(tree, is_failed):
        is_bad = is_failed & ~tree_allfinite(tree, axis_name) if is_kept else is_failed
        return jtu.tree_map(lambda x: jnp.where(is_bad, other, x), tree)

    # Of one that was lost on the way nothing has come as far as its start.
    is_bad = is_failed & start.is_lost if is_kept else is_failed
    each = per_sample(problem.is_batch)
    of_y = each(settle)(cts(start), is_bad)
    of_params = start.ct_params
    if not problem.is_batch or rule.on_failure is OnFailure.nan:
        of_params = settle(of_params, jnp.any(is_failed))
    else:
        # What the samples share is a sum, out of which none can be taken any more.
        is_needed = jnp.any(is_bad)
        if is_kept:
            is_needed = is_needed & ~tree_allfinite(of_params, axis_name)
        again = back(is_needed & ~is_bad)
        of_params = tree_where(is_needed, again.ct_params, of_params)
    start = eqx.tree_at(cts, start, of_y)
    return eqx.tree_at(lambda s: s.ct_params, start, of_params)


ReversibleAdjoint.__init__.__doc__ = """**Arguments:**

- `max_error`: The largest error of the derivative, as estimated and relative to the
    cotangent of the value, that is no failure. May be a traced scalar.
- `on_failure`: What becomes of the derivative of a sample that failed, with
    `throw=False`. Under a `batch_axis` with `equilax.OnFailure.zero` its part of what
    the samples share is left out, for which the others go back a second time.
    `equilax.OnFailure.keep` gives that of the steps that were undone.
"""
