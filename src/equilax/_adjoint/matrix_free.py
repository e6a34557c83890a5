"""Solve the system of a derivative by products alone: our own linear solvers."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import cast, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._custom_types import AxisName
from .._dtype import rounding
from .._fused import TransposedAt
from .._linear import (
    AbstractMatrixFreeSolver,
    FallbackLinearSolver,
    is_at_rounding,
    is_resolved,
    KrylovLinearSolver,
    Neumann,
    Preconditioned,
    solve_from,
    Terms,
)
from .._mesh import all_vary, any_varying
from .._misc import per_sample
from .._norm import divisor, max_norm, measured
from .._solution import RESULTS
from .._solver import AbstractFixedPointSolver
from .base import Problem
from .outcome import Outcome, singular_where
from .ravelling import Ravelling
from .rule import Rule


T = TypeVar("T")


def _tolerance(solver: AbstractFixedPointSolver, y: PyTree[Array]) -> Array:
    """The relative tolerance that the forward solve had at `y`."""
    size = max_norm(y, solver.axis_name)
    absolute = jnp.asarray(solver.atol, size.dtype)
    relative = jnp.asarray(solver.rtol, size.dtype)
    # A solution near zero has few digits; a derivative there need not have as few.
    relative = relative + absolute / jnp.maximum(size, 1)
    smallest = 4 * rounding(y)
    return lax.stop_gradient(jnp.maximum(jnp.minimum(relative, 1e-3), smallest))


def _of_coupled(linear_solver, problem: Problem) -> AbstractMatrixFreeSolver:
    """The linear solver, or an error where it cannot solve for all samples at once."""
    if problem.batching.axis_names and isinstance(linear_solver, FallbackLinearSolver):
        linear_solver = linear_solver.first
    if problem.batching.axis_names and isinstance(linear_solver, KrylovLinearSolver):
        raise ValueError(
            "`linear_solver=KrylovLinearSolver` solves for each sample by itself, "
            "which an `fn` with a collective over a vmapped axis does not allow: take "
            "`equilax.FixedPointLinearSolver` for the adjoint instead."
        )
    return cast(AbstractMatrixFreeSolver, linear_solver)


class _Verdict(eqx.Module):
    """Whether to trust a solution of one sample."""

    solver: AbstractMatrixFreeSolver
    eps: float
    axis_name: AxisName

    def size(self, x):
        return measured(self.solver.norm, x, self.axis_name)

    def judge(self, value, result, residual, vector, largest):
        """Whether it is usable, how it ended, and its residual relative to `vector`.

        **Arguments:**

        - `largest`: The maximum norm of all that the value depends on.
        """
        is_usable = result == RESULTS.successful
        if not isinstance(self.solver, Neumann):  # Whose residual costs a product.
            is_good = is_at_rounding(value, residual, vector, self.eps, self.axis_name)
            is_usable = is_usable | (is_good & (result == RESULTS.stagnation))
            is_lost = ~is_resolved(value, largest, self.eps, self.axis_name)
            result = singular_where(is_usable & is_lost, result)
            is_usable = is_usable & ~is_lost
        size = divisor(self.size(vector)).astype(residual.dtype)
        return is_usable, result, residual / size

    def is_true(self, value, residual, left, vector):
        """Whether what is `left` of the right-hand side is the residual it claims."""
        size = jnp.maximum(self.size(value), self.size(vector))
        return left <= 2 * residual + 64 * self.eps * size.astype(residual.dtype)


def _preconditioned(
    solver: AbstractMatrixFreeSolver,
    product_for: Callable,
    ravelling: Ravelling,
    is_alone: bool,
    vector: Array,
) -> AbstractMatrixFreeSolver:
    """The solver with the estimate of an inverse, for a `vector` of the system."""
    product = product_for(ravelling.unravel(vector))
    first = Preconditioned(
        solver, lambda v: ravelling.ravel(product(ravelling.unravel(v)))
    )
    return first if is_alone else FallbackLinearSolver(first, solver)


def _without_derivative(tree: T) -> T:
    arrays, static = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(lax.stop_gradient(arrays), static)


def _fused_at(problem: Problem, y: PyTree[Array]) -> TransposedAt | None:
    """What has kernels for the transposed system."""
    if problem.fused is None:
        return None
    fused = _without_derivative(problem.fused)
    return TransposedAt(all_vary(fused, any_varying(y)), y)


def _terms(problem: Problem, tolerance: Array, fused: TransposedAt | None) -> Terms:
    return Terms(
        tolerance,
        problem.batching,
        problem.is_batch,
        axis_name=problem.solver.axis_name,
        fused=fused,
        like=_without_derivative(problem.solver),
    )


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
    solver = _of_coupled(rule.linear_solver, problem)
    is_truncated = isinstance(solver, Neumann)
    tolerance = each(ft.partial(_tolerance, problem.solver))(y)
    # JAX (to 0.12) lets all constants of a `custom_linear_solve` vary as its right-hand
    # side does, after their types have gone into the trace of what they are used in.
    solver, tolerance = all_vary((solver, tolerance), any_varying(y))
    names = tuple(problem.batching.axis_names)
    # One system of all samples has one tolerance, as it has one unit below.
    tolerance = lax.pmin(tolerance, names) if names else tolerance
    terms = _terms(problem, tolerance, _fused_at(problem, y) if is_transposed else None)
    verdict = _Verdict(solver, rounding(y), terms.axis_name)

    preconditioned = lambda vector: solver
    if rule.preconditioner is not None:
        product_for = rule.preconditioner.prepare(
            problem, y, state, is_transposed=is_transposed
        )
        # An estimate that is no good may keep from being solved what can be. Of a
        # truncation nobody expects a solution.
        is_alone = is_truncated or bool(names)
        preconditioned = ft.partial(
            _preconditioned, solver, product_for, ravelling, is_alone
        )

    def solve(mv, vector: Float[Array, "..."], guess) -> Outcome:
        unit, largest = None, terms.size(max_norm, vector)
        if names:
            unit = lax.pmax(terms.size(solver.norm, vector), names)
            largest = lax.pmax(largest, names)
        sol = solve_from(
            preconditioned(vector),
            mv,
            vector,
            dataclasses.replace(terms, unit=unit),
            guess=guess,
        )
        residual = sol.stats["residual"]
        is_usable, result, relative = each(verdict.judge)(
            sol.value, sol.result, residual, vector, largest
        )
        if not is_truncated and (problem.is_batch or names):
            # Of systems that depend on each other each has been solved as if it did
            # not. Where it does, what is left of all of them tells.
            left = terms.size(solver.norm, vector - mv(sol.value))
            is_usable = is_usable & each(verdict.is_true)(
                sol.value, residual, left, vector
            )
        return Outcome(sol.value, result, is_usable, relative, sol.stats)

    return solve
