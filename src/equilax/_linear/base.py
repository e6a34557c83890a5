import abc
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from .._batching import AbstractBatching, Staged
from .._custom_types import BoolScalar
from .._dtype import rounding
from .._norm import max_norm
from .._solution import RESULTS, Solution


# A solve that stopped at the level of rounding of its solution is as good as its dtype
# allows, provided that the residual is also small beside the right-hand side. Without
# that a singular system would pass, whose solution grows until this is so.
_ROUNDING_UNITS = 64
_STOPPED_SHORT = 1e-3


def is_at_rounding(
    value: PyTree[Array], residual: Scalar, vector: PyTree[Array]
) -> BoolScalar:
    """Whether a solution of `vector` with this `residual` cannot be bettered."""
    eps = rounding(vector)
    size = max_norm(vector) * max(_STOPPED_SHORT, _ROUNDING_UNITS / 2 * eps)
    floor = jnp.minimum(_ROUNDING_UNITS * eps * max_norm(value), size)
    return residual <= floor.astype(residual.dtype)


class AbstractMatrixFreeSolver(lx.AbstractLinearSolver[lx.AbstractLinearOperator]):
    """Abstract base class for linear solvers that need products alone.

    They are Lineax solvers, for [`lineax.linear_solve`][], and can also be called with
    a function: that is how an adjoint runs them where Lineax's primitive cannot go
    (`shard_map`, half precision, `jax.export`).
    """

    @abc.abstractmethod
    def solve(
        self,
        mv: Callable[[PyTree[Array]], PyTree[Array]],
        vector: PyTree[Array],
        *,
        tolerance: Scalar | float,
        batching: AbstractBatching,
        is_batch: bool = False,
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
        """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        del options
        if operator.in_structure() != operator.out_structure():
            raise ValueError(
                f"`{type(self).__name__}` needs a square operator; got one that maps "
                f"{operator.in_structure()} to {operator.out_structure()}."
            )
        return operator

    def compute(self, state, vector: PyTree[Array], options: dict[str, Any]):
        del options
        sol = self.solve(
            state.mv, vector, tolerance=100 * rounding(vector), batching=Staged()
        )
        stats = {k: v for k, v in sol.stats.items() if k != "max_steps"}
        ran_out = sol.result == RESULTS.max_steps_reached
        is_good = sol.result == RESULTS.successful
        result = lx.RESULTS.where(
            ran_out, lx.RESULTS.max_steps_reached, lx.RESULTS.breakdown
        )
        result = lx.RESULTS.where(is_good, lx.RESULTS.successful, result)
        return sol.value, result, stats

    def transpose(self, state: lx.AbstractLinearOperator, options: dict[str, Any]):
        return state.T, options

    def conj(self, state: lx.AbstractLinearOperator, options: dict[str, Any]):
        return lx.conj(state), options

    def assume_full_rank(self) -> bool:
        return True
