from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .initial import with_norm
from .residual_block import conv


class Fusion(eqx.Module):
    """The way from one resolution to another (Bai, Koltun and Kolter 2020, figure 2).

    To a coarser one by 3 by 3 convolutions of stride two, one for each halving and with
    a rectifier in between; to a finer one by a 1 by 1 convolution, of which the pixels
    are repeated.
    """

    convs: tuple[eqx.nn.Conv2d, ...]
    num_doublings: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_doublings: int,
        norm: float,
        *,
        dtype: Any,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`, `channels`: Those where it comes from and where it leads.
        - `num_doublings`: How often height and width double, negative if they halve.
        - `norm`: About the spectral norm of the whole.
        - `dtype`: The dtype of the parameters.
        - `key`: A PRNG key.
        """
        if num_doublings > 0:
            # A pixel that is repeated n times has the root of n times its norm.
            norm = norm / 2**num_doublings
            convs = [conv(in_channels, channels, 1, dtype=dtype, key=key)]
        else:
            keys = jr.split(key, -num_doublings)
            outs = [in_channels] * (len(keys) - 1) + [channels]
            convs = [
                conv(in_channels, out, 3, stride=2, dtype=dtype, key=k)
                for out, k in zip(outs, keys, strict=True)
            ]
        self.convs = (*convs[:-1], with_norm(convs[-1], norm))
        self.num_doublings = num_doublings

    def __call__(self, z: Float[Array, "c h w"]) -> Float[Array, "d k l"]:
        for layer in self.convs[:-1]:
            z = jax.nn.relu(layer(z))
        z = self.convs[-1](z)
        for axis in (1, 2) if self.num_doublings > 0 else ():
            z = jnp.repeat(z, 2**self.num_doublings, axis)
        return z
