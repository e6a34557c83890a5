from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_callable, check_integer, check_key
from .initial import parameter_dtype
from .residual_block import check_groups, conv, group_norm, ResidualBlock
from .sample import check_dtype, check_shape


class ConvCell(eqx.Module):
    r"""A residual convolutional cell with group normalisation, for one resolution.

    $(z, x) \mapsto N_3(\phi(z + N_2(\hat x + C_2\, \phi(N_1(C_1 z))))), \quad
    \hat x = N_0(C_0 x)$

    with 3 by 3 convolutions $C$ and group normalisations $N$, which is the block of
    Bai, Koltun and Kolter (2020, section 3.2). A normalisation by group keeps a fixed
    point a fixed point: it has no statistics of a batch, nor of earlier steps.

    $C_2$ is new with a spectral norm of about 0.3, beside an injection of deviation
    one. The Jacobian at a new cell's fixed point is then mostly that of
    $N_3(\phi(z + \hat x))$, and $N_3$ divides by more than one, for $z$ and $\hat x$
    agree there. That is so whatever the scale of $x$, down to about 0.01, below which
    $N_0$ no longer brings it to deviation one and a solve takes more steps. A group
    needs some elements, a few dozen: where all but a few are cut off by $\phi$, the
    normalisation divides by next to nothing.

    Cost of a call: `9 * channels * (in_channels + 2 * channels) * height * width`
    multiplications. Memory: its linearisation keeps about twelve times `z`.
    """

    injection: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    block: ResidualBlock
    in_channels: int = eqx.field(static=True)
    channels: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        channels: int,
        groups: int = 1,
        activation: Callable = jax.nn.relu,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`: The channels of the input `x`.
        - `channels`: The channels of the state `z`.
        - `groups`: Of channels that are normalised together, a divisor of `channels`.
        - `activation`: Applied elementwise.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        sizes = {"in_channels": in_channels, "channels": channels, "groups": groups}
        for name, size in sizes.items():
            check_integer(name, size, 1)
        check_groups(groups, channels)
        check_callable("activation", activation, "activation(z)")
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        x_key, z_key = jr.split(key)
        self.injection = conv(in_channels, channels, 3, dtype=dtype, key=x_key)
        self.norm = group_norm(groups, channels, dtype)
        self.block = ResidualBlock(channels, groups, activation, dtype=dtype, key=z_key)
        self.in_channels = in_channels
        self.channels = channels

    def init(
        self, x: Float[Array, "in_channels height width"]
    ) -> Float[Array, "channels height width"]:
        """The start of a solve: zero."""
        check_shape("x", x, (self.in_channels, "height", "width"))
        return jnp.zeros((self.channels, *x.shape[1:]), self.injection.weight.dtype)

    def __call__(
        self,
        z: Float[Array, "channels h w"],
        x: Float[Array, "in_channels height width"],
    ) -> Float[Array, "channels height width"]:
        """**Arguments:**

        - `z`: The state, of the height and width of `x`.
        - `x`: The injected image.

        **Returns:**

        The next state.

        **Raises:**

        - `ValueError`: At trace time, if a shape or a dtype is not that of the cell.
        """
        check_shape("x", x, (self.in_channels, "height", "width"))
        check_shape("z", z, (self.channels, *x.shape[1:]))
        for name, value in (("x", x), ("z", z)):
            check_dtype(name, value, self.injection.weight.dtype)
        return self.block(z, self.norm(self.injection(x)))
