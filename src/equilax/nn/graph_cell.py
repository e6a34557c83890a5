from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._check import check_callable, check_integer, check_key
from .adjacency import check_adjacency
from .initial import parameter_dtype, with_norm
from .sample import check_dtype, check_shape


class GraphCell(eqx.Module):
    r"""An implicit graph network, $(Z, (X, A)) \mapsto \phi(A Z W + X U + b)$.

    Each row of the state $Z$ belongs to a node, and $A_{ij}$ is the weight with which
    node $i$ listens to node $j$ (Gu et al. 2020, equation 2, transposed, with
    $b_\Omega(X) = X U + b$). An equilibrium lets a node depend on all nodes that it is
    connected to, however many edges away.

    With an activation whose slope is at most one the cell contracts if the product of
    the spectral norms of $W$ and $A$ is below one (Gu et al. 2020, theorem 3.1, has the
    weaker condition on the Perron-Frobenius eigenvalue of $|W| \otimes |A|$). An
    adjacency from [`equilax.nn.normalise_adjacency`][] has a norm of at most one, and
    $W$ is new with a norm of about 0.8; training may raise it.

    A batch over one graph is `jax.vmap(layer, in_axes=((0, None),))`; several sparse
    ones are a `BCOO` with `n_batch=1`. `equinox.filter_vmap` does not take a `BCOO`.

    Cost of a call, for `n` nodes and `m` edges: `n * features * (features +
    in_features) + m * features` multiplications, with `m` the square of `n` if the
    adjacency is dense. Memory: its linearisation keeps one number for each of the
    state, and $A$.
    """

    weight: eqx.nn.Linear
    injection: eqx.nn.Linear
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

        - `in_features`: The size of the input at one node.
        - `features`: The size of the state at one node.
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
        z_key, x_key = jr.split(key)
        linear = eqx.nn.Linear
        weight = linear(features, features, use_bias=False, dtype=dtype, key=z_key)
        self.weight = with_norm(weight, 0.8)
        self.injection = linear(in_features, features, dtype=dtype, key=x_key)
        self.activation = activation
        self.in_features = in_features
        self.features = features

    def init(self, x: PyTree[Array]) -> Float[Array, "nodes features"]:
        """The start of a solve: zero."""
        inputs, _ = self._inputs_and_adjacency(x)
        return jnp.zeros((inputs.shape[0], self.features), self.weight.weight.dtype)

    def __call__(
        self, z: Float[Array, "nodes features"], x: PyTree[Array]
    ) -> Float[Array, "nodes features"]:
        """**Arguments:**

        - `z`: The state.
        - `x`: A pair of the inputs of the nodes, `(nodes, in_features)`, and the
            adjacency, `(nodes, nodes)`: an array or a `jax.experimental.sparse.BCOO`.

        **Returns:**

        The next state.

        **Raises:**

        - `ValueError`: At trace time, if a shape or a dtype is not that of the cell, or
            the adjacency is not square.
        """
        inputs, adjacency = self._inputs_and_adjacency(x)
        check_shape("z", z, (inputs.shape[0], self.features))
        check_dtype("z", z, self.weight.weight.dtype)
        check_dtype("x", inputs, self.weight.weight.dtype)
        check_dtype("adjacency", adjacency, self.weight.weight.dtype)
        heard = adjacency @ jax.vmap(self.weight)(z)
        return self.activation(heard + jax.vmap(self.injection)(inputs))

    def _inputs_and_adjacency(self, x):
        if not (isinstance(x, tuple) and len(x) == 2):
            raise ValueError(
                "`x` must be a pair of the inputs of the nodes and the adjacency; got "
                f"{type(x).__name__}."
            )
        inputs, adjacency = x
        check_shape("x", inputs, ("nodes", self.in_features))
        check_adjacency(adjacency)
        if adjacency.shape[0] != inputs.shape[0]:
            raise ValueError(
                "`adjacency` must have a row and a column for each node, of which `x` "
                f"has {inputs.shape[0]}; got the shape {adjacency.shape}."
            )
        return x
