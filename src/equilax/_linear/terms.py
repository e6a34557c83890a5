from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, PyTree

from .._batching import AbstractBatching, Staged
from .._custom_types import AxisName, Norm
from .._fused import TransposedAt
from .._misc import per_sample
from .._norm import measured
from .._solver import AbstractFixedPointSolver


class Terms(eqx.Module):
    """On which terms a linear system is solved: how precisely, in what surroundings.

    What [`equilax.AbstractMatrixFreeSolver`][] is handed beside the system.
    """

    tolerance: Array | float
    batching: AbstractBatching = Staged()
    is_batch: bool = eqx.field(static=True, default=False)
    unit: Array | None = None
    axis_name: AxisName = eqx.field(static=True, default=None)
    fused: TransposedAt | None = None
    like: AbstractFixedPointSolver | None = None

    @property
    def each(self) -> Callable[[Callable], Callable]:
        """How a function of one sample is called."""
        return per_sample(self.is_batch)

    def size(self, norm: Norm, tree: PyTree[Array]) -> Array:
        """`tree` in a norm, each sample by itself."""
        return self.each(lambda x: measured(norm, x, self.axis_name))(tree)


Terms.__init__.__doc__ = """**Arguments:**

- `tolerance`: The residual to reach, relative to `unit`, for a solver that has no
    tolerance of its own; dimensionless.
- `batching`: How the solve runs under `jax.vmap`.
- `is_batch`: Whether the right-hand side is a batch, along the first axis, that the
    operator takes as one. `tolerance`, `unit`, the result and the statistics are then a
    sample's each.
- `unit`: What tolerances are relative to, in the `norm` of the solver. `None` is the
    right-hand side.
- `axis_name`: The mesh axes along which the right-hand side is split.
- `fused`: What has kernels for $u = v + (I - A) u$, or `None`.
- `like`: The solver of the forward pass, or `None`: a fixed point without a solver of
    its own may take after it.
"""
