from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_callable, check_integer, check_key
from .initial import new_norm, parameter_dtype
from .sample import check_dtype, check_shape


class MLPCell(eqx.Module):
    r"""A multilayer perceptron of the state and the input, $\mathrm{MLP}([z, x])$.

    The cell of Bai et al. (2019, equation 1) with a map of more than one layer. It is
    new with the parameters of an `equinox.nn.MLP`, except for the columns of the first
    matrix that multiply $z$: these are scaled so that the product of the spectral norms
    on the way from $z$ to $z$ is about 0.8. With an activation whose slope is at most
    one the cell then contracts, while $x$ acts as strongly as it does in any other
    perceptron. Training may raise that product beyond one.

    Cost of a call: `width * (2 * features + in_features + (depth - 1) * width)`
    multiplications. Memory: its linearisation keeps `depth * width` numbers.
    """

    mlp: eqx.nn.MLP
    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        features: int,
        width: int,
        depth: int = 1,
        activation: Callable = jnp.tanh,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`: The size of the input `x`.
        - `features`: The size of the state `z`.
        - `width`: The size of each hidden layer.
        - `depth`: The number of hidden layers.
        - `activation`: Applied elementwise after each hidden layer.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        sizes = {"in_features": in_features, "features": features, "width": width}
        for name, size in (sizes | {"depth": depth}).items():
            check_integer(name, size, 1)
        # Numbers of NumPy's would have a dtype in what is computed from them.
        in_features, features, width = int(in_features), int(features), int(width)
        check_callable("activation", activation, "activation(z)")
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        both = features + in_features
        mlp = eqx.nn.MLP(
            both,
            features,
            width,
            int(depth),
            activation,
            dtype=dtype,
            key=key,
        )
        # Of the first matrix the fan-in is both sizes, but the columns only some.
        first = new_norm(features, width) * (features / both) ** 0.5
        product = first * new_norm(width, width) ** (int(depth) - 1)
        product *= new_norm(width, features)
        scale = jnp.ones((1, both), dtype).at[:, :features].set(0.8 / product)
        self.mlp = eqx.tree_at(
            lambda mlp: mlp.layers[0].weight, mlp, scale * mlp.layers[0].weight
        )
        self.in_features = in_features
        self.features = features

    def init(self, x: Float[Array, " in_features"]) -> Float[Array, " features"]:
        """The start of a solve: zero."""
        check_shape("x", x, (self.in_features,))
        return jnp.zeros((self.features,), self.mlp.layers[0].weight.dtype)

    def __call__(
        self, z: Float[Array, " features"], x: Float[Array, " in_features"]
    ) -> Float[Array, " features"]:
        """**Arguments:**

        - `z`: The state.
        - `x`: The injected input.

        **Returns:**

        The next state.

        **Raises:**

        - `ValueError`: At trace time, if a shape or a dtype is not that of the cell.
        """
        check_shape("x", x, (self.in_features,))
        check_shape("z", z, (self.features,))
        for name, value in (("x", x), ("z", z)):
            check_dtype(name, value, self.mlp.layers[0].weight.dtype)
        return self.mlp(jnp.concatenate([z, x]))
