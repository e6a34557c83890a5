from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_integer, check_key
from .initial import new_norm, parameter_dtype
from .sample import check_dtype, check_shape


class GRUCell(eqx.Module):
    r"""A gated recurrent unit that is given the same input again and again.

    With $\sigma$ the logistic function, $r = \sigma(W_r x + U_r z + b_r)$ and
    $u = \sigma(W_u x + U_u z + b_u)$,

    $(z, x) \mapsto (1 - u) \odot \tanh(W x + b + r \odot (U z + c)) + u \odot z$

    (Cho et al. 2014, equations 5 to 8; as the update of an equilibrium Bai et al. 2022,
    Deep equilibrium optical flow). As $u < 1$, its fixed points are those of the
    candidate, $z = \tanh(W x + b + r \odot (U z + c))$: the gate $u$ sets the pace at
    which a unit moves there, and not the place. The implicit gradient in $W_u, U_u,
    b_u$ is therefore zero; these parameters learn only through an adjoint that
    differentiates the steps, or a penalty on the Jacobian.

    The matrices $U$ are new with a spectral norm of about 0.8, for with the norm 1.2 of
    an `equinox.nn.GRUCell` the candidate need not contract.

    Cost of a call: `3 * features * (features + in_features)` multiplications. Memory:
    its linearisation keeps about six times `z`.
    """

    gru: eqx.nn.GRUCell
    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`: The size of the input `x`.
        - `features`: The size of the state `z`.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        for name, size in (("in_features", in_features), ("features", features)):
            check_integer(name, size, 1)
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        gru = eqx.nn.GRUCell(in_features, features, dtype=dtype, key=key)
        scale = jnp.asarray(0.8 / new_norm(features, features), dtype)
        self.gru = eqx.tree_at(lambda gru: gru.weight_hh, gru, scale * gru.weight_hh)
        self.in_features = in_features
        self.features = features

    def init(self, x: Float[Array, " in_features"]) -> Float[Array, " features"]:
        """The start of a solve: zero."""
        check_shape("x", x, (self.in_features,))
        return jnp.zeros((self.features,), self.gru.weight_hh.dtype)

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
            check_dtype(name, value, self.gru.weight_hh.dtype)
        return self.gru(x, z)
