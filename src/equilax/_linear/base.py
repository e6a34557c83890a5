import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._batching import AbstractBatching, Staged
from .._custom_types import AxisName, BoolScalar, Norm
from .._dtype import rounding
from .._misc import per_sample, tree_where
from .._norm import max_norm, measured
from .._solution import RESULTS, Solution


# A solve that stopped at the level of rounding of its solution is as good as its dtype
# allows, provided that the residual is also small beside the right-hand side. Without
# that a singular system would pass, whose solution grows until this is so.
_ROUNDING_UNITS = 64
_STOPPED_SHORT = 1e-3


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
        *,
        tolerance: Array | float,
        batching: AbstractBatching,
        is_batch: bool = False,
        unit: Array | None = None,
        axis_name: AxisName = None,
    ) -> Solution:
        """Solve `mv(x) = vector`.

        **Arguments:**

        - `mv`: A linear function.
        - `vector`: The right-hand side.
        - `tolerance`: The residual to reach, relative to `vector`, for a solver that
            has no tolerance of its own.
        - `batching`: How the solve runs under `jax.vmap`.
        - `is_batch`: Whether `vector` is a batch, along the first axis, that `mv` takes
            as one. `tolerance`, the result and the statistics are then a sample's each.
        - `unit`: What tolerances are relative to, in `norm`: `None` is `vector`.
        - `axis_name`: The mesh axes along which `vector` is split.
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
        sol = solve_from(
            solver,
            operator.mv,
            vector,
            guess=options.get("y0"),
            tolerance=100 * rounding(vector),
            batching=Staged(),
        )
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

    def solve(
        self,
        mv,
        vector,
        *,
        tolerance,
        batching,
        is_batch=False,
        unit=None,
        axis_name=None,
    ):
        sol = self.solver.solve(
            lambda w: mv(self.product(w)),
            vector,
            tolerance=tolerance,
            batching=batching,
            is_batch=is_batch,
            unit=unit,
            axis_name=axis_name,
        )
        return dataclasses.replace(sol, value=self.product(sol.value))


def solve_from(
    solver: AbstractMatrixFreeSolver,
    mv: Callable[[PyTree[Array]], PyTree[Array]],
    vector: PyTree[Array],
    *,
    guess: PyTree[Array] | None,
    tolerance: Array | float,
    batching: AbstractBatching,
    is_batch: bool = False,
    unit: Array | None = None,
    axis_name: AxisName = None,
) -> Solution:
    """Solve `mv(x) = vector` from a first guess, unless zero is nearer.

    The other arguments are those of `solver.solve`. Cost: a product more.
    """
    solve = ft.partial(
        solver.solve,
        mv,
        tolerance=tolerance,
        batching=batching,
        is_batch=is_batch,
        axis_name=axis_name,
    )
    if guess is None:
        return solve(vector, unit=unit)
    residual = jtu.tree_map(jnp.subtract, vector, mv(guess))
    begin = per_sample(is_batch)(ft.partial(_begin, solver.norm, axis_name))
    start, rhs, size = begin(vector, guess, residual)
    sol = solve(rhs, unit=size if unit is None else unit)
    stats = {**sol.stats, "num_fn_evals": sol.stats["num_fn_evals"] + 1}
    value = jtu.tree_map(jnp.add, start, sol.value)
    return dataclasses.replace(sol, value=value, stats=stats)


def _begin(
    norm: Norm,
    axis_name: AxisName,
    vector: PyTree[Array],
    guess: PyTree[Array],
    residual: PyTree[Array],
) -> tuple[PyTree[Array], PyTree[Array], Scalar]:
    """The start, the right-hand side from there, and the size of that from zero."""
    size, left = (measured(norm, x, axis_name) for x in (vector, residual))
    # False for a guess that is not finite.
    is_nearer = left < size
    zero = jtu.tree_map(jnp.zeros_like, guess)
    start = tree_where(is_nearer, guess, zero)
    rhs = tree_where(is_nearer, residual, vector)
    return start, rhs, size
