from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .initial import with_norm


def conv(in_channels: int, channels: int, size: int, **kwargs) -> eqx.nn.Conv2d:
    """A convolution that keeps height and width, or with `stride=2` halves them.

    It has no bias: the normalisation after it has one, and of a dark image it would
    leave little else.
    """
    kwargs = {"padding": size // 2, "use_bias": False} | kwargs
    return eqx.nn.Conv2d(in_channels, channels, size, **kwargs)


def group_norm(groups: int, channels: int, dtype: Any) -> eqx.nn.GroupNorm:
    return eqx.nn.GroupNorm(groups, channels, dtype=dtype)


def check_groups(groups: int, channels: int):
    """Refuse channels that cannot be divided among the groups."""
    if channels % groups != 0:
        raise ValueError(
            f"`groups` must divide `channels`; got {groups} groups of {channels}."
        )


class ResidualBlock(eqx.Module):
    r"""The residual block of a multiscale equilibrium model, for one resolution.

    $(z, \hat x) \mapsto N_3(\phi(z + N_2(\hat x + C_2\, \phi(N_1(C_1 z)))))$

    with convolutions $C$ and group normalisations $N$ (Bai, Koltun and Kolter 2020,
    section 3.2). At a fixed point $z$ and the injection agree, so that what $N_3$
    divides by is about twice the deviation of $z$, before $\phi$ lowers it: with a
    second convolution that is small the Jacobian is well below one.
    """

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    norms: tuple[eqx.nn.GroupNorm, eqx.nn.GroupNorm, eqx.nn.GroupNorm]
    activation: Callable

    def __init__(
        self,
        channels: int,
        groups: int,
        activation: Callable,
        *,
        dtype: Any,
        key: PRNGKeyArray,
    ):
        first, second = jr.split(key)
        self.first = conv(channels, channels, 3, dtype=dtype, key=first)
        # Beside an injection of unit variance it hardly counts at first.
        self.second = with_norm(
            conv(channels, channels, 3, dtype=dtype, key=second), 0.3
        )
        norms = [group_norm(groups, channels, dtype) for _ in range(3)]
        self.norms = (norms[0], norms[1], norms[2])
        self.activation = activation

    def __call__(
        self, z: Float[Array, "c h w"], injected: Float[Array, "c h w"]
    ) -> Float[Array, "c h w"]:
        hidden = self.activation(self.norms[0](self.first(z)))
        residual = self.norms[1](injected + self.second(hidden))
        return self.norms[2](self.activation(z + residual))
