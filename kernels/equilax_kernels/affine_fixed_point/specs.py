"""The shapes that tests and benchmarks share."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


class Spec(NamedTuple):
    """One problem size."""

    rows: int
    d: int
    dtype: Any = jnp.float32
    history_length: int = 0
    is_scaled: bool = False
    precision: lax.Precision = lax.Precision.HIGHEST


# For interpreters: one feature, what does not fill up a tile of either backend, several
# tiles.
SMALL = (
    Spec(3, 1),
    Spec(13, 24),
    Spec(1, 16, history_length=1),
    Spec(19, 7, history_length=3),
    Spec(21, 20, is_scaled=True),
    Spec(9, 12, history_length=5, is_scaled=True),
)

_DEFAULT = lax.Precision.DEFAULT
# For compilers, those of all backends: from the size at which a kernel pays most, over
# what fills up neither axis, to the largest.
COMPILED = (
    Spec(4096, 128),
    Spec(4096, 128, precision=_DEFAULT),
    Spec(4096, 128, jnp.bfloat16, precision=_DEFAULT),
    Spec(1001, 100, is_scaled=True),
    Spec(1001, 100, jnp.bfloat16, is_scaled=True, precision=_DEFAULT),
    Spec(1001, 64, history_length=5),
    Spec(1001, 128, history_length=5, is_scaled=True),
    Spec(1001, 100, jnp.bfloat16, history_length=5, precision=_DEFAULT),
    Spec(4096, 64, is_scaled=True, precision=_DEFAULT),
    Spec(1001, 32),
    Spec(1001, 50, is_scaled=True),
    Spec(1001, 50, history_length=5, precision=_DEFAULT),
    Spec(5, 20, is_scaled=True),
    Spec(1, 1),
)
# What one backend alone takes.
COMPILED_FOR_TRITON = (Spec(1001, 250, jnp.bfloat16, precision=_DEFAULT),)
COMPILED_FOR_TPU = (
    Spec(1001, 512, history_length=5, is_scaled=True),
    Spec(1001, 1024, is_scaled=True),
    Spec(1001, 2048, jnp.bfloat16, precision=_DEFAULT),
)
