from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_fraction, check_instance


class VariationalDropout(eqx.Module):
    r"""Dropout whose mask is drawn once per solve (Gal and Ghahramani 2016).

    $x \mapsto m \odot x / (1 - p)$ with each entry of $m$ zero with probability $p$.
    The mask depends on the key alone, and a layer hands the same key to every
    evaluation of its cell: so the map does not change from step to step, and neither
    does its fixed point (Bai et al. 2019). With a fresh mask in each step there would
    be none.

    Along `axes` one draw is shared. For a sequence `(length, features)` they are
    `(0,)`: a feature is dropped at all positions, or at none.

    `equinox.nn.inference_mode` turns it off.
    """

    dropout: eqx.nn.Dropout
    axes: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self, p: float = 0.5, axes: tuple[int, ...] = (), inference: bool = False
    ):
        """**Arguments:**

        - `p`: The probability that an entry is dropped.
        - `axes`: The axes along which entries share a draw.
        - `inference`: Whether to drop nothing.
        """
        check_fraction("p", p)
        check_instance("axes", axes, Sequence)
        for axis in axes:
            check_instance("axes", axis, int)
        check_instance("inference", inference, bool)
        self.dropout = eqx.nn.Dropout(p, inference)
        self.axes = tuple(axes)

    def __call__(
        self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """**Arguments:**

        - `x`: What to drop entries of.
        - `key`: A PRNG key, on which the mask depends. Needed unless `p` is zero or
            `inference` is set. Keyword only argument.

        **Returns:**

        An array like `x`.

        **Raises:**

        - `ValueError`: At trace time, if the key is missing, or `x` lacks an axis.
        """
        if any(not -x.ndim <= axis < x.ndim for axis in self.axes):
            raise ValueError(
                f"`axes` must be axes of `x`, of shape {x.shape}; got {self.axes}."
            )
        if self.dropout.inference or self.dropout.p == 0:
            return x
        if key is None:
            raise ValueError(
                "`key` is needed to drop anything; got `None`. For inference use "
                "`equinox.nn.inference_mode`."
            )
        shared = {axis % x.ndim for axis in self.axes}
        shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
        return x * self.dropout(jnp.ones(shape, x.dtype), key=key)
