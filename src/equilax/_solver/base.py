import abc
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
from equinox import AbstractVar
from jaxtyping import PyTree, Scalar

from .._custom_types import (
    Args,
    BoolScalar,
    IntScalar,
    Norm,
    RealScalarLike,
    SolverState,
    Y,
)


class Evaluation(eqx.Module, Generic[Y]):
    """An iterate with the value of `fn` there: what a step starts from.

    **Attributes:**

    - `y`: The iterate.
    - `f`: `fn(y, args)`. Finite where `proceed`.
    - `residual`: The solver's norm of `f - y`, in the units of `y`.
    - `num_steps`: The steps taken so far. The same number for all samples of a batch
        that are live, so that `vmap` leaves it alone and an index made from it keeps an
        update in place.
    - `is_live`: Whether the solve had not ended before this evaluation.
    - `proceed`: Whether it goes on after this evaluation: a step is wanted.
    """

    y: Y
    f: Y
    residual: Scalar
    num_steps: IntScalar
    is_live: BoolScalar
    proceed: BoolScalar


class AbstractFixedPointSolver(eqx.Module, Generic[Y, SolverState]):
    """Abstract base class for all fixed-point solvers, each written for one problem.

    The loop around a solver evaluates `fn` at each iterate, tests the residual there,
    and asks the solver for the next one. That is why no solver can claim a convergence
    that it doesn't have.
    """

    rtol: AbstractVar[RealScalarLike]
    atol: AbstractVar[RealScalarLike]
    norm: AbstractVar[Norm]

    @abc.abstractmethod
    def init(self, y: Y, *, max_steps: int) -> SolverState:
        """Build the state for the initial guess `y`, without an evaluation of `fn`."""

    @abc.abstractmethod
    def step(
        self,
        fn: Callable[[Y, Args], Y],
        at: Evaluation[Y],
        args: Args,
        state: SolverState,
    ) -> tuple[Y, SolverState, int]:
        """Propose the next iterate.

        **Arguments:**

        - `fn`: Maps `(y, args)` to a tree like `y`. Already evaluated at `at.y`.
        - `at`: The iterate and what is known there.
        - `args`: Passed on to `fn`.
        - `state`: As returned by `init` or by the last step.

        **Returns:**

        The next iterate, the next state, and how often `fn` was evaluated on the way.
        The iterate must be finite where `at.y` and `at.f` are; it is ignored unless
        `at.proceed`. The state must be returned unchanged unless `at.is_live`: nobody
        else freezes it, so that a history can be written in place.
        """

    @abc.abstractmethod
    def postprocess(
        self, y: Y, residual: Scalar, is_successful: BoolScalar, state: SolverState
    ) -> tuple[Y, Scalar, dict[str, PyTree[Any]]]:
        """Return the value to report, its residual, and extra entries for `stats`."""
