from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_callable, check_integer, check_key
from .._dtype import promote
from .._fused import AbstractFusedCell
from .affine_map import AffineMap
from .initial import parameter_dtype
from .sample import check_shape


class AffineCell(eqx.Module):
    r"""The cell $(z, x) \mapsto \mathrm{activation}(W z + U x + b)$ (Bai et al. 2019).

    With an activation whose slope is at most one, the cell contracts if the spectral
    norm of $W$ is below one. At initialisation that norm is about 0.8; training may
    raise it, and [`equilax.Anderson`][] goes on converging well beyond one.

    Cost of a call: `features * (features + in_features)` multiplications.
    """

    weight: Float[Array, "features features"]
    injection: Float[Array, "features in_features"]
    bias: Float[Array, " features"]
    activation: Callable
    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: Callable = jnp.tanh,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`: The size of the input `x`.
        - `features`: The size of the state `z`.
        - `activation`: Applied elementwise.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        for name, size in (("in_features", in_features), ("features", features)):
            check_integer(name, size, 1)
        check_callable("activation", activation, "activation(z)")
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        w_key, u_key = jr.split(key)
        # A normal matrix of deviation s has a spectral norm of about 2 s sqrt(n).
        scale = jnp.asarray(0.4 / features**0.5, dtype)
        self.weight = scale * jr.normal(w_key, (features, features), dtype)
        scale = jnp.asarray(1 / in_features**0.5, dtype)
        self.injection = scale * jr.normal(u_key, (features, in_features), dtype)
        self.bias = jnp.zeros((features,), dtype)
        self.activation = activation
        self.in_features = in_features
        self.features = features

    def init(self, x: Float[Array, " in_features"]) -> Float[Array, " features"]:
        """The start of a solve: zero, in the dtype that a call returns."""
        return jnp.zeros((self.features,), promote(x.dtype, self.weight.dtype))

    def fused(self, x: Float[Array, " in_features"]) -> AbstractFusedCell:
        """The map at `x`, in the form that has kernels.

        Their activations are `jnp.tanh`, `jax.nn.relu`, `jax.nn.gelu`,
        `jax.nn.softplus` and `jax.nn.identity`.
        """
        return AffineMap(self.weight, self._drive(x), self.activation)

    def _drive(self, x):
        check_shape("x", x, (self.in_features,))
        return self.injection @ x + self.bias

    def __call__(
        self, z: Float[Array, " features"], x: Float[Array, " in_features"]
    ) -> Float[Array, " features"]:
        """**Arguments:**

        - `z`: The state.
        - `x`: The injected input.

        **Returns:**

        The next state.
        """
        return self.activation(self.weight @ z + self._drive(x))
