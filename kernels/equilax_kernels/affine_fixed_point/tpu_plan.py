"""How many rows a tile has on TPU, and what it needs of VMEM."""

from typing import Any

import jax.numpy as jnp

from . import extrapolation


LANES = 128
SUBLANES = 8
# What a kernel may take of the 64 MiB or more that a core has, on all generations that
# there are compilers for.
VMEM_BYTES = 48 * 2**20
# As many rows as the matrix unit is high.
_TILE = 128


def _rounded_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def _padded(rows: int, columns: int, dtype: Any) -> int:
    """The bytes of an array in VMEM, where it fills up registers."""
    size = _rounded_up(rows, SUBLANES) * _rounded_up(columns, LANES)
    return size * jnp.dtype(dtype).itemsize


def tile_of(num_rows: int) -> int:
    return min(_TILE, _rounded_up(max(num_rows, 1), SUBLANES))


def vmem_bytes(
    num_rows: int, d: int, dtype: Any, *, is_scaled: bool, history_length: int
) -> int:
    """What a tile needs: weights and blocks twice, since they are fetched ahead."""
    tile, m = tile_of(num_rows), history_length
    block, wide = _padded(tile, d, dtype), _padded(tile, d, jnp.float32)
    column = _padded(tile, 1, jnp.float32)
    blocks = 2 * (3 + is_scaled) * block + 2 * _padded(d, d, dtype)
    stats = 2 * _padded(SUBLANES, tile, jnp.float32) + _padded(tile, LANES, "float32")
    # The image, the residual and what else one pass holds at a time.
    temporaries = 6 * wide
    total = blocks + stats + temporaries + block + 7 * column
    if m > 0:
        gram = extrapolation.gram_size(m)
        total += 2 * m * block + 2 * wide + 2 * (gram + 2 + 2 * m) * column
    return total
