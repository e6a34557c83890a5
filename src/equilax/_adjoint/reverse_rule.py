"""The derivative where `fn` has a rule for reverse mode alone (`jax.custom_vjp`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree

from .._misc import Hoisted
from .base import Ended, Problem, Run
from .linear_system import linear_system
from .rule import Rule
from .transposed import settle_adjoint


def _has_custom_vjp(jaxpr: Any) -> bool:
    if isinstance(jaxpr, jex.core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    if not isinstance(jaxpr, jex.core.Jaxpr):
        return False
    return any(
        eqn.primitive.name.startswith("custom_vjp_call")
        or any(map(_has_custom_vjp, jtu.tree_leaves(list(eqn.params.values()))))
        for eqn in jaxpr.eqns
    )


def is_for_reverse_alone(tree: PyTree[Any]) -> bool:
    """Whether a function among the leaves has no derivative in forward mode."""
    is_hoisted = lambda x: isinstance(x, Hoisted)
    leaves = jtu.tree_leaves(tree, is_leaf=is_hoisted)
    return any(_has_custom_vjp(x.jaxpr) for x in leaves if is_hoisted(x))


@eqx.filter_custom_vjp
def _solve(params, solve, constants: Problem, rule: Rule) -> Ended:
    del rule
    problem = _problem(params, constants)
    return solve(problem, None)


def _problem(params, constants: Problem) -> Problem:
    fn, args, monitor = params
    return dataclasses.replace(constants, fn=fn, args=args, monitor=monitor)


@_solve.def_fwd
def _solve_fwd(perturbed, params, solve, constants, rule):
    del perturbed
    ended = _solve(params, solve, constants, rule)
    return ended, (ended[0].y, ended[0].state)


@_solve.def_bwd
def _solve_bwd(end, grad, perturbed, params, solve, constants, rule):
    del solve
    (y, state), problem = end, _problem(params, constants)
    zero_if_none = lambda a, ct: jnp.zeros_like(a) if ct is None else ct
    ct = jtu.tree_map(zero_if_none, y, grad[0].y)
    system = linear_system(rule, problem, y, state)
    u, ct_monitor = settle_adjoint(rule, system, problem, y, ct)
    moving, fixed = eqx.partition((problem.fn, problem.args), perturbed[:2])

    def of_params(moving):
        fn, args = eqx.combine(moving, fixed)
        return fn(y, args)

    (ct_params,) = jax.vjp(of_params, moving)[1](u)
    if ct_monitor is None:
        ct_monitor = jtu.tree_map(lambda _: None, problem.monitor)
    return (*ct_params, ct_monitor)


def _absent(y, args):
    del args
    return y


def solve_in_reverse(
    solve: Callable[[Problem, Run | None], Ended], problem: Problem, rule: Rule
) -> Ended:
    """As `solve_implicitly`, for an `fn` that knows reverse mode alone."""
    params = (problem.fn, problem.args, problem.monitor)
    constants = dataclasses.replace(problem, fn=_absent, args=None, monitor=None)
    dynamic, static = eqx.partition((constants, rule), eqx.is_array)
    constants, rule = eqx.combine(lax.stop_gradient(dynamic), static)
    return _solve(params, solve, constants, rule)
