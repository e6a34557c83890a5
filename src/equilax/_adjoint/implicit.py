from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._check import check_callable
from .._linear import AbstractMatrixFreeSolver, FallbackLinearSolver
from .._misc import hoist, struct
from .base import Problem
from .implicit_rule import solve_implicitly
from .on_failure import OnFailure
from .preconditioner import Given
from .rule import AbstractImplicitAdjoint, check_rule, Rule


class ImplicitAdjoint(AbstractImplicitAdjoint):
    r"""Differentiate by the implicit function theorem, not through the iterations.

    At $y = f(y, \theta)$, with $J = \partial f / \partial y$,

    $\mathrm{d}y = (I - J)^{-1} \frac{\partial f}{\partial \theta} \mathrm{d}\theta$

    (Bai, Kolter and Koltun 2019, theorem 1; Blondel et al. 2022, equation 6). Forward
    mode solves this system, reverse mode its transpose, and higher orders of either
    follow. The derivative with respect to `y0` is zero by definition, and so is that of
    `stats` and `state`.

    A linear solve that fails is never silent: it raises if the solve was called with
    `throw=True`, and otherwise `on_failure` says what becomes of the derivative of that
    sample. One that stops at the level of rounding of the dtype has not failed: in half
    precision that is a quarter of the cotangent, so check there what you train on. An
    [`equilax.AdjointMonitor`][] tells the steps, residuals and failures of the backward
    pass.

    Cost: one linearisation of `fn`, and a product with $J$ or $J^T$ for each step of
    the linear solver. Memory: the linearisation and the linear solver's, independent of
    the steps of the forward solve.
    """

    linear_solver: lx.AbstractLinearSolver = FallbackLinearSolver()
    preconditioner: Callable[..., PyTree[Array]] | None = None
    on_failure: OnFailure = eqx.field(static=True, default=OnFailure.nan)

    def __check_init__(self):
        check_rule(self.linear_solver, self.on_failure)
        if self.preconditioner is None:
            return
        check_callable("preconditioner", self.preconditioner, "fn(vector, y, args)")
        if not isinstance(self.linear_solver, AbstractMatrixFreeSolver):
            raise ValueError(
                "`preconditioner` needs a matrix-free `linear_solver`, such as "
                "`equilax.KrylovLinearSolver()`; got "
                f"{type(self.linear_solver).__name__}."
            )

    def rule(self, problem: Problem) -> Rule:
        preconditioner = None
        if self.preconditioner is not None:
            y, fn = problem.y0, self.preconditioner
            hoisted = hoist(
                lambda v, y, args: _like(fn(v, y, args), v), y, y, problem.args
            )
            preconditioner = Given(hoisted)
        return Rule(self.linear_solver, preconditioner, self.on_failure)

    def apply(self, solve, problem):
        return solve_implicitly(solve, problem, self.rule(problem))


def _like(product: Any, vector: PyTree[Array]) -> PyTree[Array]:
    """Compare what a preconditioner returns with the vector that it was given."""
    got = struct(jtu.tree_map(jnp.asarray, product))
    if not eqx.tree_equal(got, struct(vector)):
        raise ValueError(
            "`preconditioner` must return a tree like `vector`; got "
            f"{got}, expected {struct(vector)}."
        )
    return product


ImplicitAdjoint.__init__.__doc__ = """**Arguments:**

- `linear_solver`: The solver of the linear system, any Lineax solver. The default is
    [`equilax.FallbackLinearSolver`][]. It, [`equilax.FixedPointLinearSolver`][],
    [`equilax.KrylovLinearSolver`][] and [`equilax.Neumann`][] are matrix-free, and work
    in `shard_map`, in half precision and under `jax.export` too. Lineax's direct
    solvers materialise the Jacobian, per sample.
- `preconditioner`: A function `fn(vector, y, args)`, linear in `vector`, that
    approximates $(I - J)^{-1}$ times it at the solution `y`. It is transposed for
    reverse mode. Under a `batch_axis`, `vector` and `y` have the batch first.
- `on_failure`: What becomes of the derivative of a sample whose linear solve failed,
    with `throw=False`.
"""
