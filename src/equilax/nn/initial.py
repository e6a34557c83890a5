"""Initial parameters: of which size, so that a new cell contracts."""

import math
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp


_Layer = TypeVar("_Layer", eqx.nn.Linear, eqx.nn.Conv2d)


def parameter_dtype(dtype: Any) -> Any:
    """The dtype that was asked for, or JAX's float."""
    if dtype is None:
        return jnp.zeros((), float).dtype
    if eqx.is_array_like(dtype):
        raise TypeError(f"`dtype` must be a dtype; got the array {dtype!r}.")
    try:
        dtype = jnp.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`dtype` must be a dtype; got {dtype!r}.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` must be a floating-point dtype; got {dtype}.")
    return dtype


def new_norm(in_size: int, out_size: int) -> float:
    """The spectral norm, about, of a linear layer as Equinox initialises it.

    Its entries are uniform within one over the root of the fan-in, and a large matrix
    of independent entries of deviation s has the norm s (sqrt(m) + sqrt(n)) (Bai and
    Yin 1993). At each frequency a convolution is such a matrix, of its channels.
    """
    return (math.sqrt(in_size) + math.sqrt(out_size)) / math.sqrt(3 * in_size)


def with_norm(layer: _Layer, norm: float) -> _Layer:
    """A new layer, scaled to a spectral norm of about `norm`."""
    if isinstance(layer, eqx.nn.Linear):
        sizes = int(layer.in_features), int(layer.out_features)
    else:
        sizes = layer.in_channels, layer.out_channels
    return eqx.tree_at(
        lambda layer: layer.weight,
        layer,
        layer.weight * jnp.asarray(norm / new_norm(*sizes), layer.weight.dtype),
    )
