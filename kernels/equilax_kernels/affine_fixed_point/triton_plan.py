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
    - `chunk`: The features of the weights that are on chip at a time: all of them for
        as long as the kernel runs, or one part after the other in every step.
    """

    tile: int
    num_warps: int
    width: int
    chunk: int


# The smallest operand of a product.
_LEAST = 16
# By the widths up to which they hold: tile, warps, chunk. Each was compiled for an H100
# with register spills as errors, with every activation, scaled and damped.
_TENSOR_CORES = {64: (64, 8, 64), 128: (32, 8, 128), 256: (16, 8, 32), 512: (16, 8, 32)}
_SINGLE = {32: (32, 4, 32), 64: (16, 8, 64), 128: (16, 8, 32), 256: (16, 8, 32)}
_ANDERSON = {32: (16, 8, 32), 128: (8, 8, 128), 256: (8, 8, 32)}


def plan_of(d: int, dtype: Any, settings: Settings) -> Plan | None:
    """The plan for `d` features, if there is one."""
    is_single = dtype == jnp.float32 and settings.precision is lax.Precision.HIGHEST
    plans = _SINGLE if is_single else _TENSOR_CORES
    if settings.history_length > 0:
        plans = _ANDERSON
        if is_single and settings.history_length > 3 and d > 128:
            return None
    width = max(_LEAST, 1 << (d - 1).bit_length())
    fitting = [plan for limit, plan in plans.items() if width <= limit]
    if not fitting:
        return None
    tile, num_warps, chunk = fitting[0]
    return Plan(tile, num_warps, width, min(chunk, width))
