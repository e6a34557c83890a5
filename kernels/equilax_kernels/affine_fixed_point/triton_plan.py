"""How many rows of what size a program of Triton holds, so that no register spills."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from .rules import Settings


class Plan(NamedTuple):
    """How a tile is worked on.

    **Attributes:**

    - `tile`: Its rows.
    - `num_warps`: The warps of 32 threads that share it.
    - `width`: Its columns, a power of two.
    """

    tile: int
    num_warps: int
    width: int


# The smallest operand of a product.
_LEAST = 16
# By the widths up to which they hold: tile and warps. Each was compiled for an H100
# with register spills as errors, by JAX 0.10.2 and 0.11.2. All of the weights must fit
# on chip: fetched in parts in every step, to tiles of 16 rows of 256 features, they are
# 16 KiB a row, and XLA's loop moves 10.
_SINGLE = {32: (16, 4), 64: (16, 16), 128: (8, 8)}
_SINGLE_ON_TENSOR_CORES = {64: (64, 8), 128: (32, 8)}
_HALF = {64: (64, 8), 128: (32, 8), 256: (16, 8)}
# The triangle of inner products of a row is in the registers of all threads of a warp.
_ANDERSON = {32: (8, 8), 64: (8, 4), 128: (8, 8)}


def plan_of(d: int, dtype: Any, settings: Settings) -> Plan | None:
    """The plan for `d` features, if there is one."""
    if settings.history_length > 0:
        plans = _ANDERSON
    elif dtype != jnp.float32:
        plans = _HALF
    elif settings.precision is lax.Precision.HIGHEST:
        plans = _SINGLE
    else:
        plans = _SINGLE_ON_TENSOR_CORES
    width = max(_LEAST, 1 << (d - 1).bit_length())
    fitting = [plan for limit, plan in plans.items() if width <= limit]
    return Plan(*fitting[0], width) if fitting else None
