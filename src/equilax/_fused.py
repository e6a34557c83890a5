"""Maps whose whole solve some devices do in one kernel."""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from equilax_kernels import on_platform
from jaxtyping import Array, Float, PyTree, Scalar

from ._custom_types import IntScalar
from ._mesh import all_vary, any_varying
from ._solution import RESULTS
from ._solver import AbstractFixedPointSolver, Progress


class FusedEnd(eqx.Module):
    """How a solve ended that was done in one kernel."""

    value: Float[Array, " d"]
    result: RESULTS
    num_steps: IntScalar
    residual: Scalar
    state: PyTree[Any]


FusedEnd.__init__.__doc__ = """**Arguments:**

- `value`: The fixed point; of a solve that failed, the best iterate.
- `result`: How it ended.
- `num_steps`: The updates, int32.
- `residual`: The norm of `f(value) - value`, in the dtype that the solver has for it.
- `state`: What `solver.init` returns: a kernel leaves nothing learnt.
"""


class AbstractFusedMap(eqx.Module):
    """Abstract base class for a map of a vector, with kernels for its fixed point."""

    @abc.abstractmethod
    def kernels(
        self, solver: AbstractFixedPointSolver, y0: Float[Array, " d"], max_steps: int
    ) -> Mapping[str, Callable[[], FusedEnd]]:
        """What solves from `y0` as `solver` would, and judges as it does.

        **Returns:**

        By the name of an implementation, `"tpu"` or `"triton"`, a function of no
        arguments. Under `jax.vmap` of it the samples share a kernel. Empty where there
        is none for this solver.
        """


class AbstractFusedCell(AbstractFusedMap):
    """Abstract base class for a map that has kernels for its adjoint too.

    What the method `fused(x)` of a cell returns, by which an
    [`equilax.nn.FixedPointLayer`][] takes its kernels.
    """

    @abc.abstractmethod
    def transposed(
        self, y: Float[Array, " d"], vector: Float[Array, " d"]
    ) -> AbstractFusedMap:
        """The map $u \\mapsto J^T u + v$ with $J$ the Jacobian at `y`."""


class TransposedAt(eqx.Module):
    """The map of an adjoint, for whichever right-hand side."""

    fused: AbstractFusedCell
    y: Float[Array, " d"]

    def __call__(self, vector: Float[Array, " d"]) -> AbstractFusedMap:
        return self.fused.transposed(self.y, vector)


def iterate_fused(
    fused: AbstractFusedMap | None,
    solver: AbstractFixedPointSolver,
    y0: PyTree[Array],
    *,
    max_steps: int,
    iterate: Callable[[], Progress],
) -> Progress:
    """Call `iterate`, or what does the same in one kernel where the device has it.

    **Arguments:**

    - `fused`: The map, or `None` if it has no kernels.
    """
    if fused is None:
        return iterate()
    axes = any_varying((fused, solver, y0))
    solves = fused.kernels(solver, y0, max_steps)
    aligned = lambda run: lambda: all_vary(run(), axes)
    as_progress = lambda run: lambda: _progress(run(), y0)
    kernels = {name: aligned(as_progress(run)) for name, run in solves.items()}
    return on_platform(aligned(iterate), kernels) if kernels else iterate()


def _progress(end: FusedEnd, y0: PyTree[Array]) -> Progress:
    """As the loop of a solver leaves it, as far as anybody looks."""
    false = jnp.array(False)
    value = jtu.tree_map(lambda x, like: x.astype(like.dtype), end.value, y0)
    return Progress(
        y=value,
        state=end.state,
        result=end.result,
        is_live=false,
        num_steps=end.num_steps,
        num_fn_evals=end.num_steps + 1,
        residual=end.residual,
        first_residual=end.residual,
        best_residual=end.residual,
        best_step=end.num_steps,
        best_y=value,
        is_trial=false,
        is_last=false,
    )
