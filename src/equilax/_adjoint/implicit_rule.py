"""The derivative of a fixed point: one rule for all modes and orders."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .base import Ended, Problem, Run
from .linear_system import derivative, linear_system
from .reverse_rule import is_for_reverse_alone, solve_in_reverse
from .rule import Rule


def _is_none(x) -> bool:
    return x is None


def solve_implicitly(
    solve: Callable[[Problem, Run | None], Ended], problem: Problem, rule: Rule
) -> Ended:
    """Solve `problem`, its solution differentiated by the implicit function theorem."""
    if is_for_reverse_alone(problem.fn):
        return solve_in_reverse(solve, problem, rule)
    return _solve(solve, problem, rule)


@eqx.filter_custom_jvp
def _solve(
    solve: Callable[[Problem, Run | None], Ended], problem: Problem, rule: Rule
) -> Ended:
    del rule
    return solve(problem, None)


@_solve.def_jvp
def _solve_jvp(primals, tangents):
    solve, problem, rule = primals
    ended = _solve(solve, problem, rule)
    y, state = ended[0].y, ended[0].state
    t_ended = jtu.tree_map(lambda _: None, ended)

    # Of `y0`, the solver and the rule the solution is independent.
    params = (problem.fn, problem.args)
    t_params = (tangents[1].fn, tangents[1].args)
    t_monitor = tangents[1].monitor
    if not jtu.tree_leaves((t_params, t_monitor)):
        return ended, t_ended
    no_tangent = jtu.tree_map(_is_none, t_params, is_leaf=_is_none)
    fixed, moving = eqx.partition(params, no_tangent, is_leaf=_is_none)

    def of_params(moving):
        fn, args = eqx.combine(moving, fixed)
        return fn(y, args)

    if jtu.tree_leaves(t_params):
        _, rhs = jax.jvp(of_params, (moving,), (t_params,))
    else:
        rhs = jtu.tree_map(jnp.zeros_like, y)
    system = linear_system(rule, problem, y, state)
    t_y = derivative(rule, system, problem, rhs, t_monitor)
    t_ended = eqx.tree_at(lambda e: e[0].y, t_ended, t_y, is_leaf=_is_none)
    return ended, t_ended
