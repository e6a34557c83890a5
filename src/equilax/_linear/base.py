import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._custom_types import AxisName, BoolScalar, Norm
from .._dtype import rounding
from .._misc import tree_where
from .._norm import max_norm
from .._solution import RESULTS, Solution
from .terms import Terms


# A solve that stopped at the level of rounding of its solution is as good as its dtype
# allows, provided that the residual is also small beside the right-hand side. Without
# that a singular system would pass, whose solution grows until this is so.
_ROUNDING_UNITS = 64
_STOPPED_SHORT = 1e-3
# Rounding may be this much of the right-hand side. The error of the solution is up to
# twenty times that: of 600 systems in float32 the worst below 1/256 was off by 8%, at
# 1/64 by 27%, at a tenth by 80%. From half precision less is expected.
_RESOLVED, _RESOLVED_IN_HALF = 1 / 256, 1 / 2


def is_at_rounding(
    value: PyTree[Array],
    residual: Scalar,
    vector: PyTree[Array],
    eps: float,
    axis_name: AxisName,
) -> BoolScalar:
    """Whether a solution of `vector` with this `residual` cannot be bettered.

    **Arguments:**

    - `eps`: The relative rounding of the products.
    - `axis_name`: The mesh axes along which `value` and `vector` are split.
    """
    size = max_norm(vector, axis_name) * max(_STOPPED_SHORT, _ROUNDING_UNITS / 2 * eps)
    floor = jnp.minimum(_ROUNDING_UNITS * eps * max_norm(value, axis_name), size)
    return residual <= floor.astype(residual.dtype)


def is_resolved(
    value: PyTree[Array], size: Scalar, eps: float, axis_name: AxisName = None
) -> BoolScalar:
    """Whether a solution is more than what rounding makes up.

    Products are off by `eps` times `value`. Where that is as much as the right-hand
    side, any residual, be it zero, is one of rounding: the system is singular to
    working precision.

    **Arguments:**

    - `size`: The maximum norm of the right-hand side.
    - `eps`, `axis_name`: As above.
    """
    limit = _RESOLVED_IN_HALF if eps > 1e-6 else _RESOLVED
    return ~(max_norm(value, axis_name) > size * (limit / eps))


# The system, and an approximate inverse of it.
_Operators: TypeAlias = tuple[
    lx.AbstractLinearOperator, lx.AbstractLinearOperator | None
]


class AbstractMatrixFreeSolver(lx.AbstractLinearSolver[_Operators]):
    """Abstract base class for linear solvers that need products alone.

    They are Lineax solvers, for [`lineax.linear_solve`][], and can also be called with
    a function: that is how an adjoint runs them where Lineax's primitive cannot go
    (`shard_map`, half precision, `jax.export`).

    For [`lineax.linear_solve`][] the `options` are those of Lineax's iterative solvers:
    `preconditioner`, an operator that approximates the inverse, and `y0`, a first guess
    of the solution.
    """

    @property
    @abc.abstractmethod
    def norm(self) -> Norm:
        """The norm of the `residual` in `stats`."""

    @abc.abstractmethod
    def solve(
        self,
        mv: Callable[[PyTree[Array]], PyTree[Array]],
        vector: PyTree[Array],
        terms: Terms,
    ) -> Solution:
        """Solve `mv(x) = vector`.

        **Arguments:**

        - `mv`: A linear function.
        - `vector`: The right-hand side.
        - `terms`: How precisely, and in which surroundings.
        """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        if operator.in_structure() != operator.out_structure():
            raise ValueError(
                f"`{type(self).__name__}` needs a square operator; got one that maps "
                f"{operator.in_structure()} to {operator.out_structure()}."
            )
        unknown = options.keys() - {"preconditioner", "y0"}
        if unknown:
            raise ValueError(
                f"`{type(self).__name__}` has the `options` `preconditioner` and `y0`; "
                f"got {sorted(unknown)}."
            )
        return operator, options.get("preconditioner")

    def compute(self, state, vector: PyTree[Array], options: dict[str, Any]):
        operator, preconditioner = state
        solver = self
        if preconditioner is not None:
            solver = Preconditioned(self, preconditioner.mv)
        terms = Terms(100 * rounding(vector))
        sol = solve_from(solver, operator.mv, vector, terms, guess=options.get("y0"))
        stats = {k: v for k, v in sol.stats.items() if k != "max_steps"}
        ran_out = sol.result == RESULTS.max_steps_reached
        is_good = sol.result == RESULTS.successful
        result = lx.RESULTS.where(
            ran_out, lx.RESULTS.max_steps_reached, lx.RESULTS.breakdown
        )
        result = lx.RESULTS.where(is_good, lx.RESULTS.successful, result)
        return sol.value, result, stats

    def transpose(self, state, options: dict[str, Any]):
        # A guess is one of the system that is not transposed.
        operator, preconditioner = state
        transposed = None if preconditioner is None else preconditioner.T
        return (operator.T, transposed), {}

    def conj(self, state, options: dict[str, Any]):
        operator, preconditioner = state
        conjugate = None if preconditioner is None else lx.conj(preconditioner)
        return (lx.conj(operator), conjugate), {}

    def assume_full_rank(self) -> bool:
        return True


class Preconditioned(AbstractMatrixFreeSolver):
    """A solver of the system preconditioned from the right.

    Residuals are those of the system itself.

    **Attributes:**

    - `solver`: Solves `mv(product(w)) = vector`.
    - `product`: A linear function that approximates the inverse of `mv`.
    """

    solver: AbstractMatrixFreeSolver
    product: Callable[[PyTree[Array]], PyTree[Array]]

    @property
    def norm(self):
        return self.solver.norm

    def solve(self, mv, vector, terms):
        # The kernels know of no product.
        terms = dataclasses.replace(terms, fused=None)
        sol = self.solver.solve(lambda w: mv(self.product(w)), vector, terms)
        return dataclasses.replace(sol, value=self.product(sol.value))


def solve_from(
    solver: AbstractMatrixFreeSolver,
    mv: Callable[[PyTree[Array]], PyTree[Array]],
    vector: PyTree[Array],
    terms: Terms,
    *,
    guess: PyTree[Array] | None,
) -> Solution:
    """Solve `mv(x) = vector` from a first guess, unless zero is nearer.

    Cost: a product more than `solver.solve`.
    """
    if guess is None:
        return solver.solve(mv, vector, terms)
    residual = jtu.tree_map(jnp.subtract, vector, mv(guess))
    size, left = (terms.size(solver.norm, x) for x in (vector, residual))
    begin = terms.each(_begin)
    start, rhs = begin(left < size, vector, guess, residual)
    if terms.unit is None:
        terms = dataclasses.replace(terms, unit=size)
    sol = solver.solve(mv, rhs, terms)
    stats = {**sol.stats, "num_fn_evals": sol.stats["num_fn_evals"] + 1}
    value = jtu.tree_map(jnp.add, start, sol.value)
    return dataclasses.replace(sol, value=value, stats=stats)


def _begin(
    is_nearer: BoolScalar,
    vector: PyTree[Array],
    guess: PyTree[Array],
    residual: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array]]:
    """The start, and the right-hand side from there."""
    # What is not finite is no nearer.
    zero = jtu.tree_map(jnp.zeros_like, guess)
    start = tree_where(is_nearer, guess, zero)
    return start, tree_where(is_nearer, residual, vector)
