from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_callable, check_instance, check_integer, check_key
from .fusion import Fusion
from .initial import parameter_dtype
from .residual_block import check_groups, conv, group_norm, ResidualBlock
from .sample import check_dtype, check_shape


_State = tuple[Float[Array, "_ _ _"], ...]


class MultiscaleCell(eqx.Module):
    r"""A multiscale cell, whose state is a tuple of images of halving resolution.

    A residual block as that of an [`equilax.nn.ConvCell`][] for each resolution $i$,
    then each becomes a sum over all of them:

    $b_i = \mathrm{block}_i(z_i, \hat x_i), \quad
    z_i' = N_i\left(b_i + \textstyle\sum_{j \neq i} F_{ij} b_j\right)$

    with $F_{ij}$ convolutions of stride two from a finer to a coarser one, and a 1 by 1
    convolution whose pixels are repeated the other way (Bai, Koltun and Kolter 2020,
    section 3.2). All resolutions reach equilibrium together. Two things differ from
    there. There is one normalisation after the sum. And a convolution of $x$, averaged
    down, is injected at every resolution: one without an injection of its own
    normalises nothing but its own feedback, however small, and does not contract.

    The $F_{ij}$ that lead to a resolution are new with spectral norms of about 0.3 in
    sum, so that a new cell converges as its blocks do.

    Cost of a call, in multiplications: for each resolution of `c` channels and `p`
    pixels, `9 * c * (in_channels + 2 * c) * p` for the block, and for each pair of them
    `9 * c * d` a coarser pixel on the way down and `c * d` on the way up. Memory: its
    linearisation keeps about fifteen times `z`.
    """

    injections: tuple[eqx.nn.Conv2d, ...]
    injection_norms: tuple[eqx.nn.GroupNorm, ...]
    blocks: tuple[ResidualBlock, ...]
    fusions: tuple[tuple[Fusion | None, ...], ...]
    norms: tuple[eqx.nn.GroupNorm, ...]
    in_channels: int = eqx.field(static=True)
    channels: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        groups: int = 1,
        activation: Callable = jax.nn.relu,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_channels`: The channels of the input `x`.
        - `channels`: The channels of the state at each resolution, the finest first.
        - `groups`: Of channels that are normalised together, a divisor of each.
        - `activation`: Applied elementwise in the blocks.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        check_integer("in_channels", in_channels, 1)
        check_integer("groups", groups, 1)
        channels = _check_channels(channels, groups)
        check_callable("activation", activation, "activation(z)")
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        num, of_scale = len(channels), list(enumerate(channels))
        x_keys, z_keys, f_keys = jr.split(key, (3, num))
        new_norms = lambda: tuple(group_norm(groups, c, dtype) for c in channels)
        self.injections = tuple(
            conv(in_channels, c, 3, dtype=dtype, key=x_keys[i]) for i, c in of_scale
        )
        self.injection_norms = new_norms()
        self.blocks = tuple(
            ResidualBlock(c, groups, activation, dtype=dtype, key=z_keys[i])
            for i, c in of_scale
        )
        norm = 0.3 / max(num - 1, 1)
        fuse = lambda i, j, key: Fusion(
            channels[j], channels[i], j - i, norm, dtype=dtype, key=key
        )
        self.fusions = tuple(
            tuple(
                None if i == j else fuse(i, j, k)
                for j, k in enumerate(jr.split(f_keys[i], num))
            )
            for i in range(num)
        )
        self.norms = new_norms()
        self.in_channels = in_channels
        self.channels = channels

    def init(self, x: Float[Array, "in_channels height width"]) -> _State:
        """The start of a solve: zero at each resolution."""
        dtype = self.injections[0].weight.dtype
        return tuple(jnp.zeros(shape, dtype) for shape in self._shapes(x))

    def __call__(
        self, z: _State, x: Float[Array, "in_channels height width"]
    ) -> _State:
        """**Arguments:**

        - `z`: The state: at resolution `i`, counted from zero, an image of
            `channels[i]` channels and of the height and width of `x` over `2**i`.
        - `x`: The injected image.

        **Returns:**

        The next state.

        **Raises:**

        - `ValueError`: At trace time, if a shape or a dtype is not that of the cell, or
            the height or width cannot be halved often enough.
        """
        self._check(z, x)
        parts = []
        for i, block in enumerate(self.blocks):
            injected = self.injections[i](_average(x, 2**i))
            parts.append(block(z[i], self.injection_norms[i](injected)))
        new_z = []
        for norm, fusions, total in zip(self.norms, self.fusions, parts, strict=True):
            for fusion, part in zip(fusions, parts, strict=True):
                total = total if fusion is None else total + fusion(part)
            new_z.append(norm(total))
        return tuple(new_z)

    def _shapes(self, x) -> list[tuple[int, int, int]]:
        check_shape("x", x, (self.in_channels, "height", "width"))
        _, height, width = x.shape
        factor = 2 ** (len(self.channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"`x` must have a height and a width that {factor} divides, for the "
                f"{len(self.channels)} resolutions; got {height} and {width}."
            )
        return [(c, height >> i, width >> i) for i, c in enumerate(self.channels)]

    def _check(self, z, x):
        shapes = self._shapes(x)
        if len(z) != len(shapes):
            raise ValueError(
                f"`z` must be a tuple of {len(shapes)} arrays, one for each "
                f"resolution; got {len(z)}."
            )
        for name, value in (("x", x), *((f"z[{i}]", v) for i, v in enumerate(z))):
            check_dtype(name, value, self.injections[0].weight.dtype)
        for i, shape in enumerate(shapes):
            check_shape(f"z[{i}]", z[i], shape)


def _check_channels(channels: Sequence[int], groups: int) -> tuple[int, ...]:
    check_instance("channels", channels, Sequence)
    channels = tuple(channels)
    if not channels:
        raise ValueError("`channels` must have a number for each resolution; got none.")
    for size in channels:
        check_integer("channels", size, 1)
        check_groups(groups, size)
    return channels


def _average(x: Float[Array, "c h w"], size: int) -> Float[Array, "c k l"]:
    """The mean over squares of `size` by `size` pixels."""
    channels, height, width = x.shape
    blocks = x.reshape(channels, height // size, size, width // size, size)
    return jnp.mean(blocks, axis=(2, 4))
