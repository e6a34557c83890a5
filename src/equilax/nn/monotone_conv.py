from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_integer, check_key, check_number, check_positive
from .._custom_types import RealScalarLike
from .._dtype import at_least_single
from .initial import parameter_dtype
from .monotone_linear import AbstractMonotoneLinear
from .monotone_map import FourierMap


class MonotoneConv(AbstractMonotoneLinear):
    r"""A circular convolution $W$ for which $z = \sigma(W z + u)$ has one solution.

    $W = (1 - m) I - A^T A + B - B^T$ as for [`equilax.nn.MonotoneLinear`][], with
    circular convolutions $A$ and $B$ between the channels of an image (Winston and
    Kolter 2020, section 3.3 and appendix on convolutions). The Fourier transform turns
    all of it into one matrix of `channels` by `channels` a frequency, each factorised
    by itself.

    Cost of a product or a step: two Fourier transforms and `channels**2` complex
    multiplications a frequency. Memory: `channels**2` complex numbers a frequency, and
    for the resolvent as many again.
    """

    a: Float[Array, "channels channels size size"]
    b: Float[Array, "channels channels size size"]
    channels: int = eqx.field(static=True)
    kernel_size: int = eqx.field(static=True)
    margin: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        margin: RealScalarLike = 1.0,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `channels`: The channels of the state `z`.
        - `kernel_size`: The height and width of the kernels of `A` and `B`. `W` itself
            reaches twice as far.
        - `margin`: The modulus `m` of monotonicity, positive.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        check_integer("channels", channels, 1)
        check_integer("kernel_size", kernel_size, 1)
        check_number("margin", margin)
        check_positive("margin", margin)
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        shape = (channels, channels, kernel_size, kernel_size)
        scale = jnp.asarray(0.5 / (channels**0.5 * kernel_size), dtype)
        a_key, b_key = jr.split(key)
        self.a = scale * jr.normal(a_key, shape, dtype)
        self.b = scale * jr.normal(b_key, shape, dtype)
        self.channels = channels
        self.kernel_size = kernel_size
        self.margin = float(margin)

    def prepare(self, shape):
        is_image = len(shape) == 3 and shape[0] == self.channels
        if not is_image or min(shape[1:]) < self.kernel_size:
            raise ValueError(
                f"`linear` maps states of the shape ({self.channels}, height, width), "
                f"no smaller than the kernel of {self.kernel_size}; got a state of the "
                f"shape {shape}. Use `jax.vmap` for a batch."
            )
        a, b = (self._spectrum(kernel, shape[1:]) for kernel in (self.a, self.b))
        adjoint = lambda x: jnp.swapaxes(x, -1, -2).conj()
        eye = jnp.eye(self.channels, dtype=a.dtype)[None, None]
        spectrum = (1 - self.margin) * eye - adjoint(a) @ a + b - adjoint(b)
        _, height, width = shape
        return FourierMap(spectrum=spectrum, margin=self.margin, shape=(height, width))

    def _spectrum(self, kernel, shape):
        kernel = kernel.astype(at_least_single(kernel.dtype))
        pads = [(0, 0)] * 2 + [(0, n - self.kernel_size) for n in shape]
        # The centre of the kernel at the origin.
        shift = -(self.kernel_size // 2)
        kernel = jnp.roll(jnp.pad(kernel, pads), (shift, shift), (2, 3))
        return jnp.moveaxis(jnp.fft.rfft2(kernel), (0, 1), (2, 3))

    def __call__(
        self, z: Float[Array, "channels height width"]
    ) -> Float[Array, "channels height width"]:
        """**Arguments:**

        - `z`: The state.

        **Returns:**

        The product `W z`.
        """
        return self.prepare(z.shape).mv(z)
