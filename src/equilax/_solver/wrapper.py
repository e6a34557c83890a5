import equinox as eqx
from equinox import AbstractVar

from .._custom_types import SolverState, Y
from .base import AbstractFixedPointSolver


class AbstractWrapper(AbstractFixedPointSolver[Y, SolverState]):
    """Abstract base class for what stands around a solver and judges as it does.

    **Attributes:**

    - `solver`: Its tolerances, norm and mesh axes are those of the whole.
    """

    solver: AbstractVar[AbstractFixedPointSolver]

    @property
    def rtol(self):
        return self.solver.rtol

    @property
    def atol(self):
        return self.solver.atol

    @property
    def norm(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    @property
    def axis_name(self):
        return self.solver.axis_name

    def split_along(self, axis_name):
        return eqx.tree_at(lambda s: s.solver, self, self.solver.split_along(axis_name))


def unwrapped(solver: AbstractFixedPointSolver) -> AbstractFixedPointSolver:
    """The solver inside all wrappers."""
    while isinstance(solver, AbstractWrapper):
        solver = solver.solver
    return solver
