"""Solve the linear system of a derivative: the one place that knows by which road."""

import functools as ft
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._dtype import rounding
from .._linear import AbstractMatrixFreeSolver, is_at_rounding
from .._misc import any_varying, per_sample, struct
from .._norm import divisor, max_norm
from .._ravel import raveller
from .._solution import RESULTS
from .._solver import AbstractFixedPointSolver
from .base import Problem
from .outcome import checked


def _tolerance(solver: AbstractFixedPointSolver, y: PyTree[Array]) -> Array:
    """The relative tolerance that the forward solve had at `y`."""
    size = max_norm(y)
    absolute = jnp.asarray(solver.atol, size.dtype)
    relative = jnp.asarray(solver.rtol, size.dtype)
    relative = relative + absolute / jnp.where(size == 0, 1, size)
    smallest = 4 * rounding(y)
    return lax.stop_gradient(jnp.maximum(jnp.minimum(relative, 1e-3), smallest))


def _matrix_free(
    linear_solver: AbstractMatrixFreeSolver, problem: Problem, y: PyTree[Array]
) -> Callable:
    """Solve by products alone, on the road that the forward solve took."""
    each = per_sample(problem.is_batch)
    tolerance = each(ft.partial(_tolerance, problem.solver))(y)

    def accept(value, result, residual, vector):
        is_usable = is_at_rounding(value, residual, vector)
        is_usable = is_usable & (result == RESULTS.stagnation)
        is_usable = is_usable | (result == RESULTS.successful)
        return checked(value, result, is_usable, problem.throw)

    def solve(mv, vector):
        sol = linear_solver.solve(
            mv,
            vector,
            tolerance=tolerance,
            batching=problem.batching,
            is_batch=problem.is_batch,
        )
        return each(accept)(sol.value, sol.result, sol.stats["residual"], vector)

    return solve


def _lineax(
    linear_solver: lx.AbstractLinearSolver, tags: frozenset[object], throw: bool
) -> Callable:
    """Solve by `lineax.linear_solve`, whose own derivative rules are not used."""

    def solve(mv, vector: Float[Array, " n"]):
        # An iterative solver's `atol` is absolute; a derivative must not depend on the
        # scale of its cotangent.
        unit = divisor(max_norm(vector)).astype(vector.dtype)
        operator = lx.FunctionLinearOperator(mv, struct(vector), tags)
        sol = lx.linear_solve(operator, vector / unit, linear_solver, throw=False)
        is_usable = sol.result == lx.RESULTS.successful
        result = RESULTS.promote(sol.result)
        return checked(sol.value * unit, result, is_usable, throw)

    return solve


def _check_lineax(
    linear_solver: lx.AbstractLinearSolver, rhs: PyTree[Array], problem: Problem
):
    name = type(linear_solver).__name__
    instead = "take `equilax.FixedPointLinearSolver` for the adjoint instead."
    if any_varying(rhs, problem):
        raise ValueError(
            f"`linear_solver={name}` runs through `lineax.linear_solve`, which does "
            f"not work inside `jax.shard_map` (Lineax 0.1.1): {instead}"
        )
    if problem.is_batch:
        raise ValueError(
            f"`linear_solver={name}` would solve one system for the whole batch of an "
            f"`fn` with a `batch_axis`: {instead}"
        )
    half = [x.dtype for x in jtu.tree_leaves(rhs) if jnp.finfo(x.dtype).bits < 32]
    if half:
        raise ValueError(f"`linear_solver={name}` has no {half[0]} version: {instead}")


def _real_tags(rhs: PyTree[Array], tags: frozenset[object]) -> frozenset[object]:
    """The tags that also hold of the system in real and imaginary parts."""
    definite = {lx.positive_semidefinite_tag, lx.negative_semidefinite_tag}
    is_complex = [jnp.iscomplexobj(x) for x in jtu.tree_leaves(rhs)]
    return tags & definite if any(is_complex) else tags


def solve_linear_system(
    linear_solver: lx.AbstractLinearSolver,
    rhs: PyTree[Array],
    y: PyTree[Array],
    problem: Problem,
) -> PyTree[Array]:
    """Solve `(I - J) t = rhs`, with `J` the Jacobian of `fn` in `y`.

    Linear in `rhs`, and transposed by JAX for reverse mode. `fn` is linearised once.
    """
    _, product = jax.linearize(lambda y: problem.fn(y, problem.args), y)
    if problem.is_batch:
        sample = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rhs)
        ravel, unravel = map(jax.vmap, raveller(sample))
    else:
        ravel, unravel = raveller(struct(rhs))

    def mv(t):
        return t - ravel(product(unravel(t)))

    if isinstance(linear_solver, AbstractMatrixFreeSolver):
        solve = _matrix_free(linear_solver, problem, lax.stop_gradient(y))
        transpose_solve = solve
    else:
        _check_lineax(linear_solver, rhs, problem)
        tags = _real_tags(rhs, problem.tags)
        solve = _lineax(linear_solver, tags, problem.throw)
        transposed = lx.transpose_tags(tags)
        transpose_solve = _lineax(linear_solver, transposed, problem.throw)
    # Linear in its right-hand side whatever happens in `solve`, for which reason the
    # check of the outcome is in there.
    out = lax.custom_linear_solve(
        mv, ravel(rhs), solve, transpose_solve=transpose_solve
    )
    return unravel(out)
