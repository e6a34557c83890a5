from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._dtype import at_least_single
from .parametrisation import AbstractParametrisation


def rows(weight: Any, name: str) -> Float[Array, "rows columns"]:
    """A weight as a matrix, its first axis that of what it puts out."""
    is_array = hasattr(weight, "shape") and hasattr(weight, "dtype")
    if not is_array or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(
            f"`weight` of a `{name}` must be an array of floating-point numbers; got "
            f"{weight!r}."
        )
    if weight.ndim < 2 or weight.size == 0:
        raise ValueError(
            f"`weight` of a `{name}` must have at least two axes, none of them empty; "
            f"got the shape {weight.shape}."
        )
    return weight.reshape(weight.shape[0], -1)


class WeightNorm(AbstractParametrisation):
    r"""A weight, its directions and its lengths apart (Salimans and Kingma 2016).

    Row $i$ is $g_i v_i / \|v_i\|_2$, with parameters $g$ and $v$; of a kernel of a
    convolution a row is all that leads to a channel. It stands in the place of a
    weight: `eqx.tree_at(lambda cell: cell.weight, cell, WeightNorm(cell.weight))`. See
    [`equilax.nn.prepare`][].

    Steps of an optimiser that lengthen $v$ leave the weight as long as it is, so it
    grows by its gain alone. That is no bound on the norm of a matrix; for one see
    [`equilax.nn.SpectralNorm`][] or [`equilax.nn.ContractiveLinear`][].

    Cost: three passes over the weight once a solve.
    """

    gain: Float[Array, " rows"]
    direction: Float[Array, "rows ..."]

    def __init__(self, weight: Float[Array, "rows ..."]):
        """**Arguments:**

        - `weight`: What it is worth at the start.
        """
        matrix = rows(weight, "WeightNorm").astype(at_least_single(weight.dtype))
        self.gain = jnp.linalg.norm(matrix, axis=1).astype(weight.dtype)
        self.direction = weight

    def prepare(self) -> Float[Array, "rows ..."]:
        dtype = self.direction.dtype
        v = self.direction.astype(at_least_single(dtype))
        v = v.reshape(len(v), -1)
        squares = jnp.sum(v * v, axis=1)
        # A row of zeros has no direction, and a derivative of zero.
        is_zero = squares == 0
        lengths = jnp.sqrt(jnp.where(is_zero, 1, squares))
        scales = self.gain.astype(v.dtype) / lengths
        return (scales[:, None] * v).astype(dtype).reshape(self.direction.shape)
