"""Solve the system of a derivative by products alone: our own linear solvers."""

import functools as ft
from collections.abc import Callable
from typing import cast

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._dtype import rounding
from .._linear import (
    AbstractMatrixFreeSolver,
    FallbackLinearSolver,
    is_at_rounding,
    Neumann,
    Preconditioned,
    solve_from,
)
from .._misc import per_sample
from .._norm import divisor, max_norm
from .._solution import RESULTS
from .._solver import AbstractFixedPointSolver
from .base import Problem
from .outcome import Outcome
from .ravelling import Ravelling
from .rule import Rule


def _tolerance(solver: AbstractFixedPointSolver, y: PyTree[Array]) -> Array:
    """The relative tolerance that the forward solve had at `y`."""
    size = max_norm(y)
    absolute = jnp.asarray(solver.atol, size.dtype)
    relative = jnp.asarray(solver.rtol, size.dtype)
    relative = relative + absolute / jnp.where(size == 0, 1, size)
    smallest = 4 * rounding(y)
    return lax.stop_gradient(jnp.maximum(jnp.minimum(relative, 1e-3), smallest))


def matrix_free(
    rule: Rule,
    problem: Problem,
    y: PyTree[Array],
    state: PyTree[Array],
    ravelling: Ravelling,
    *,
    is_transposed: bool,
) -> Callable:
    """A function of `(mv, vector, guess)` that solves, on the road of the forward pass.

    **Arguments:**

    - `ravelling`: From a tree like `y` to the vector of the system and back.
    """
    each = per_sample(problem.is_batch)
    solver = cast(AbstractMatrixFreeSolver, rule.linear_solver)
    tolerance = each(ft.partial(_tolerance, problem.solver))(y)

    def judge(value, result, residual, vector):
        is_usable = is_at_rounding(value, residual, vector)
        is_usable = is_usable & (result == RESULTS.stagnation)
        is_usable = is_usable | (result == RESULTS.successful)
        relative = residual / divisor(solver.norm(vector)).astype(residual.dtype)
        return is_usable, relative

    product_for = None
    if rule.preconditioner is not None:
        product_for = rule.preconditioner.prepare(
            problem, y, state, is_transposed=is_transposed
        )

    def solver_for(vector: Array) -> AbstractMatrixFreeSolver:
        if product_for is None:
            return solver
        product = product_for(ravelling.unravel(vector))
        first = Preconditioned(
            solver, lambda v: ravelling.ravel(product(ravelling.unravel(v)))
        )
        # An estimate that is no good may keep from being solved what can be. Of a
        # truncation nobody expects a solution.
        is_truncated = isinstance(solver, Neumann)
        return first if is_truncated else FallbackLinearSolver(first, solver)

    def solve(mv, vector: Float[Array, "..."], guess) -> Outcome:
        sol = solve_from(
            solver_for(vector),
            mv,
            vector,
            guess=guess,
            tolerance=tolerance,
            batching=problem.batching,
            is_batch=problem.is_batch,
        )
        is_usable, relative = each(judge)(
            sol.value, sol.result, sol.stats["residual"], vector
        )
        return Outcome(sol.value, sol.result, is_usable, relative, sol.stats)

    return solve
