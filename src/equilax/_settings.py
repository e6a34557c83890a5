import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ._adjoint import AbstractAdjoint, AdjointMonitor
from ._batching import AbstractBatching
from ._check import as_static_int, check_data, check_instance, check_integer
from ._fused import AbstractFusedCell
from ._solver import AbstractFixedPointSolver


class Settings(eqx.Module):
    """The arguments of a solve but for those of `fn`.

    **Attributes:**

    - `fuse`: Maps `args` to what has kernels for `fn`, or to `None`.
    """

    solver: AbstractFixedPointSolver
    max_steps: int = eqx.field(
        static=True, converter=ft.partial(as_static_int, "max_steps")
    )
    adjoint: AbstractAdjoint
    batching: AbstractBatching
    throw: bool = eqx.field(static=True)
    state: PyTree[Any]
    monitor: AdjointMonitor | None
    has_aux: bool = eqx.field(static=True, default=False)
    tags: frozenset[object] = eqx.field(static=True, default=frozenset())
    batch_axis: int | None = eqx.field(
        static=True, default=None, converter=ft.partial(as_static_int, "batch_axis")
    )
    fuse: Callable[[PyTree[Any]], AbstractFusedCell | None] | None = eqx.field(
        static=True, default=None
    )

    # Not by `__check_init__`, ahead of which types are checked where that is on.
    def check(self) -> None:
        check_instance("solver", self.solver, AbstractFixedPointSolver)
        check_instance("adjoint", self.adjoint, AbstractAdjoint)
        check_instance("batching", self.batching, AbstractBatching)
        check_instance("throw", self.throw, bool)
        check_instance("has_aux", self.has_aux, bool)
        check_integer("max_steps", self.max_steps, 1)
        check_instance("tags", self.tags, frozenset)
        check_data(state=self.state)
        if self.monitor is not None:
            check_instance("monitor", self.monitor, AdjointMonitor)
