import abc

import equinox as eqx
import lineax as lx

from .base import AbstractAdjoint, Problem
from .on_failure import OnFailure
from .preconditioner import AbstractPreconditioner


class Rule(eqx.Module):
    """How the linear system of a derivative is solved.

    **Attributes:**

    - `linear_solver`: Any Lineax solver.
    - `preconditioner`: An approximate inverse for it, or `None`.
    - `on_failure`: What becomes of the derivative of a sample whose solve failed.
    """

    linear_solver: lx.AbstractLinearSolver
    preconditioner: AbstractPreconditioner | None
    on_failure: OnFailure = eqx.field(static=True)


class AbstractImplicitAdjoint(AbstractAdjoint):
    """Abstract base class for adjoints that solve, or stand in for, a linear system."""

    @abc.abstractmethod
    def rule(self, problem: Problem) -> Rule:
        """How the linear system at the solution of `problem` is solved."""


def check_rule(linear_solver, on_failure):
    """Refuse arguments of an adjoint that are not what they should be."""
    if not isinstance(linear_solver, lx.AbstractLinearSolver):
        raise TypeError(
            "`linear_solver` must be a Lineax solver, such as "
            "`equilax.FixedPointLinearSolver()` or `lineax.LU()`; got "
            f"{linear_solver!r}."
        )
    if not isinstance(on_failure, OnFailure):
        names = ", ".join(f"`equilax.OnFailure.{item.name}`" for item in OnFailure)
        raise TypeError(f"`on_failure` must be one of {names}; got {on_failure!r}.")
