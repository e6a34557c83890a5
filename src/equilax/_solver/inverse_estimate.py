import abc

from jaxtyping import Array, PyTree

from .._custom_types import SolverState, Y
from .base import AbstractFixedPointSolver


class AbstractInverseEstimate(AbstractFixedPointSolver[Y, SolverState]):
    """Abstract base class for solvers that end with an estimate of an inverse."""

    @abc.abstractmethod
    def inverse_product(
        self, state: SolverState, vector: PyTree[Array], *, transpose: bool = False
    ) -> PyTree[Array]:
        r"""Multiply by the estimate $H$ of $(J - I)^{-1}$ in which a solve ended.

        **Arguments:**

        - `state`: The `Solution.state` of that solve.
        - `vector`: A tree like `y`.
        - `transpose`: Whether to multiply by $H^T$, as a cotangent needs.

        **Returns:**

        A tree like `y`, in at least single precision.

        Cost: `2 * history_length` passes through a `y`.
        """
