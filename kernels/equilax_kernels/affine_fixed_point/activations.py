"""Activations, written in operations that every backend lowers."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array


Activation: TypeAlias = Callable[[Array], Array] | None


# A comparison with a NaN is false, and so a NaN stays one. `maximum` would drop it: so
# does Triton's.
def _relu(x):
    return jnp.where(x <= 0, 0, x)


def _gelu(x):
    # Hendrycks and Gimpel 2016, section 2: what `jax.nn.gelu` is by default.
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _softplus(x):
    return _relu(x) + jnp.log1p(jnp.exp(-jnp.abs(x)))


_IN_KERNELS = {
    jnp.tanh: jnp.tanh,
    jax.nn.identity: lambda x: x,
    jax.nn.relu: _relu,
    jax.nn.gelu: _gelu,
    jax.nn.softplus: _softplus,
}


def is_known(activation: Activation) -> bool:
    # Not every callable has a hash.
    return activation is None or any(activation is fn for fn in _IN_KERNELS)


def in_kernel(activation: Activation) -> Callable[[Array], Array]:
    return (lambda x: x) if activation is None else _IN_KERNELS[activation]
