import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
from equinox import AbstractVar
from jaxtyping import PyTree, Scalar

from .._check import check_axis_name, check_norm, check_tolerances
from .._custom_types import (
    Args,
    AxisName,
    BoolScalar,
    IntScalar,
    Norm,
    RealScalarLike,
    SolverState,
    Y,
)
from .._norm import RelativeToNorm


class Evaluation(eqx.Module, Generic[Y]):
    """An iterate with the value of `fn` there: what a step starts from.

    **Attributes:**

    - `y`: The iterate.
    - `f`: `fn(y, args)`. Finite where `proceed`.
    - `residual`: The solver's norm of `f - y`, in the units of `y`.
    - `scaled`: The solver's norm of `(f - y) / (atol + rtol * |y|)`.
    - `size`: The solver's norm of `y`.
    - `best`, `best_residual`: The iterate of the smallest residual so far, this one
        included, and that residual.
    - `num_steps`: The steps taken so far in this solve. The same number for all samples
        of a batch that are live, so that `vmap` leaves it alone and an index made from
        it keeps an update in place.
    - `is_live`: Whether the solve had not ended before this evaluation.
    - `proceed`: Whether it goes on after this evaluation: a step is wanted.
    - `is_trial`: Whether the step that led here called it a trial.
    - `is_finite`: Whether all of `f` is. Always so where `proceed`, but for a trial.
    """

    y: Y
    f: Y
    residual: Scalar
    scaled: Scalar
    size: Scalar
    best: Y
    best_residual: Scalar
    num_steps: IntScalar
    is_live: BoolScalar
    proceed: BoolScalar
    is_trial: BoolScalar
    is_finite: BoolScalar


class Step(eqx.Module, Generic[Y, SolverState]):
    """What a solver proposes.

    **Attributes:**

    - `y`: The next iterate. Ignored unless the solve goes on.
    - `state`: The next state.
    - `num_evals`: How often the step evaluated `fn`, or a product with its Jacobian.
    - `is_trial`: Whether the solver can take the iterate back. A trial may be infinite,
        not a number or far off without ending the solve: the next step is the solver's
        answer to it.
    - `is_last`: Whether the solver wants no step after this one. The solve then ends as
        if `max_steps` had been reached.
    """

    y: Y
    state: SolverState
    num_evals: IntScalar | int = 0
    is_trial: BoolScalar | bool = False
    is_last: BoolScalar | bool = False


class AbstractFixedPointSolver(eqx.Module, Generic[Y, SolverState]):
    """Abstract base class for all fixed-point solvers, each written for one problem.

    The loop around a solver evaluates `fn` at each iterate, tests the residual there,
    and asks the solver for the next one. That is why no solver can claim a convergence
    that it doesn't have.
    """

    rtol: AbstractVar[RealScalarLike]
    atol: AbstractVar[RealScalarLike]
    norm: AbstractVar[Norm]
    axis_name: AbstractVar[AxisName]

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_axis_name(self.axis_name)
        norm = self.norm.norm if isinstance(self.norm, RelativeToNorm) else self.norm
        check_norm(norm, self.axis_name)

    def split_along(self, axis_name: AxisName) -> "AbstractFixedPointSolver":
        """This solver, for a state that is split along the mesh axes `axis_name`."""
        return dataclasses.replace(self, axis_name=axis_name)

    @abc.abstractmethod
    def init(
        self, y: Y, *, max_steps: int, state: SolverState | None = None
    ) -> SolverState:
        """Build the state for the initial guess `y`, without an evaluation of `fn`.

        **Arguments:**

        - `y`: The initial guess.
        - `max_steps`: The most steps that the solve may take.
        - `state`: That in which an earlier solve of the same or a neighbouring problem
            ended, to learn from; `None` if there is none.
        """

    @abc.abstractmethod
    def step(
        self,
        fn: Callable[[Y, Args], Y],
        at: Evaluation[Y],
        args: Args,
        state: SolverState,
    ) -> Step[Y, SolverState]:
        """Propose the next iterate.

        **Arguments:**

        - `fn`: Maps `(y, args)` to a tree like `y`. Already evaluated at `at.y`.
        - `at`: The iterate and what is known there.
        - `args`: Passed on to `fn`.
        - `state`: As returned by `init` or by the last step.

        **Returns:**

        The next iterate, finite where `at.y` and `at.f` are, and the next state. The
        state must be returned unchanged unless `at.is_live`: nobody else freezes it, so
        that a history can be written in place.
        """

    @abc.abstractmethod
    def postprocess(
        self, y: Y, residual: Scalar, is_successful: BoolScalar, state: SolverState
    ) -> tuple[Y, Scalar, dict[str, PyTree[Any]]]:
        """Return the value to report, its residual, and extra entries for `stats`."""
