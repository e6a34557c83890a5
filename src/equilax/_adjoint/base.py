import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
from jaxtyping import PyTree

from .._batching import AbstractBatching
from .._solver import AbstractFixedPointSolver, Progress
from .monitor import AdjointMonitor


# How a solve ended, its `y` the one to return, and what the solver adds to `stats`.
Ended: TypeAlias = tuple[Progress, dict[str, Any]]


class Problem(eqx.Module):
    """All that one solve depends on.

    **Attributes:**

    - `fn`: Maps `(y, args)` to a tree like `y`. A pytree that captures nothing.
    - `solver`, `y0`, `args`, `state`: As for [`equilax.fixed_point`][].
    - `monitor`: Collects what the backward pass has to say, or `None`.
    - `batching`: How a vmapped solve runs; the adjoint's takes the same road.
    - `tags`: Lineax tags of the Jacobian of `y - fn(y, args)` with respect to `y`.
    - `max_steps`: The most steps to take.
    - `throw`: Whether a failed adjoint solve raises.
    - `is_batch`: Whether `y0` is a batch, along the first axis, that `fn` takes as one.
    """

    fn: Callable[..., Any]
    solver: AbstractFixedPointSolver
    y0: PyTree[Any]
    args: PyTree[Any]
    state: PyTree[Any]
    monitor: AdjointMonitor | None
    batching: AbstractBatching
    tags: frozenset[object] = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    is_batch: bool = eqx.field(static=True)


class AbstractAdjoint(eqx.Module):
    """Abstract base class for all adjoints: how to differentiate through a solve."""

    @abc.abstractmethod
    def apply(
        self, solve: Callable[[Problem, Callable], Ended], problem: Problem
    ) -> Ended:
        """Solve `problem`, with derivatives attached to the `y` that is returned.

        **Arguments:**

        - `solve`: Called as `solve(problem, run)`, where `run` runs a
            [`equilax._batching.Loop`][] on its inputs.
        - `problem`: What to solve.
        """
