import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
from jaxtyping import PyTree

from .._batching import AbstractBatching, Loop
from .._fused import AbstractFusedCell
from .._solver import AbstractFixedPointSolver, Progress
from .monitor import AdjointMonitor


# How a solve ended, its `y` the one to return, and what the solver adds to `stats`.
Ended: TypeAlias = tuple[Progress, dict[str, Any]]
# Runs a loop on its inputs, as the `solve` of a batching strategy does.
Run: TypeAlias = Callable[[Loop, PyTree[Any]], Progress]


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
    - `fuse`: Maps `args` to what has kernels for `fn`, or to `None`. There may be none.
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
    fuse: Callable[[PyTree[Any]], AbstractFusedCell | None] | None = eqx.field(
        static=True, default=None
    )

    @property
    def fused(self) -> AbstractFusedCell | None:
        """What has kernels for `fn`, sample by sample."""
        is_alone = not (self.is_batch or self.batching.axis_names)
        return self.fuse(self.args) if self.fuse is not None and is_alone else None


class AbstractAdjoint(eqx.Module):
    """Abstract base class for all adjoints: how to differentiate through a solve."""

    @abc.abstractmethod
    def apply(
        self, solve: Callable[[Problem, Run | None], Ended], problem: Problem
    ) -> Ended:
        """Solve `problem`, with derivatives attached to the `y` that is returned.

        **Arguments:**

        - `solve`: Called as `solve(problem, run)`, where `run` runs a
            [`equilax._batching.Loop`][] on its inputs. `None` leaves open how the solve
            is done, for an adjoint that wants no more of it than where it ends: by the
            batching strategy of the problem, or in one kernel.
        - `problem`: What to solve.
        """
