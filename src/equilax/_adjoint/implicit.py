from collections.abc import Callable

import equinox as eqx
import jax
import jax.tree_util as jtu
import lineax as lx

from .._linear import FixedPointLinearSolver
from .base import AbstractAdjoint, Ended, Problem
from .linear_system import solve_linear_system


def _is_none(x) -> bool:
    return x is None


@eqx.filter_custom_jvp
def _solve(
    solve: Callable[[Problem, Callable], Ended],
    problem: Problem,
    linear_solver: lx.AbstractLinearSolver,
) -> Ended:
    del linear_solver
    return solve(problem, problem.batching.solve)


@_solve.def_jvp
def _solve_jvp(primals, tangents):
    solve, problem, linear_solver = primals
    ended = _solve(solve, problem, linear_solver)
    y = ended[0].y
    t_ended = jtu.tree_map(lambda _: None, ended)

    # Of `y0`, the solver and the linear solver the solution is independent.
    params = (problem.fn, problem.args)
    t_params = (tangents[1].fn, tangents[1].args)
    if not jtu.tree_leaves(t_params):
        return ended, t_ended
    no_tangent = jtu.tree_map(_is_none, t_params, is_leaf=_is_none)
    fixed, moving = eqx.partition(params, no_tangent, is_leaf=_is_none)

    def of_params(moving):
        fn, args = eqx.combine(moving, fixed)
        return fn(y, args)

    _, rhs = jax.jvp(of_params, (moving,), (t_params,))
    t_y = solve_linear_system(linear_solver, rhs, y, problem)
    t_ended = eqx.tree_at(lambda e: e[0].y, t_ended, t_y, is_leaf=_is_none)
    return ended, t_ended


class ImplicitAdjoint(AbstractAdjoint):
    r"""Differentiate by the implicit function theorem, not through the iterations.

    At $y = f(y, \theta)$, with $J = \partial f / \partial y$,

    $\mathrm{d}y = (I - J)^{-1} \frac{\partial f}{\partial \theta} \mathrm{d}\theta$

    (Bai, Kolter and Koltun 2019, theorem 1; Blondel et al. 2022, equation 6). Forward
    mode solves this system, reverse mode its transpose, and higher orders of either
    follow. The derivative with respect to `y0` is zero by definition, and so is that of
    `stats` and `state`.

    A linear solve that fails is never silent: it raises if the solve was called with
    `throw=True`, and otherwise makes the derivative of that sample not-a-number. One
    that stops at the level of rounding of the dtype has not failed.

    Cost: one linearisation of `fn`, and a product with $J$ or $J^T$ for each step of
    the linear solver. Memory: the linearisation and the linear solver's, independent of
    the steps of the forward solve.
    """

    linear_solver: lx.AbstractLinearSolver = FixedPointLinearSolver()

    def __check_init__(self):
        if not isinstance(self.linear_solver, lx.AbstractLinearSolver):
            raise TypeError(
                "`linear_solver` must be a Lineax solver, such as "
                "`equilax.FixedPointLinearSolver()` or `lineax.LU()`; got "
                f"{self.linear_solver!r}."
            )

    def apply(self, solve, problem):
        return _solve(solve, problem, self.linear_solver)


ImplicitAdjoint.__init__.__doc__ = """**Arguments:**

- `linear_solver`: The solver of the linear system, any Lineax solver.
    [`equilax.FixedPointLinearSolver`][] and [`equilax.Neumann`][] are matrix-free, and
    work in `shard_map`, in half precision and under `jax.export` too. Lineax's direct
    solvers materialise the Jacobian, per sample.
"""
