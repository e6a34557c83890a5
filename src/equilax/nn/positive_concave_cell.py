from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_integer, check_key, check_number, check_positive
from .._custom_types import RealScalarLike
from .._dtype import promote
from .._fused import AbstractFusedCell
from .activation import look_at
from .affine_map import AffineMap
from .initial import parameter_dtype
from .sample import check_shape


_POINTS = np.array([*np.linspace(0.03, 8.05, 97), 1e2, 1e4, 1e6])
# At the last point: sqrt has 5e-4 there, and identity one.
_LARGEST_SLOPE = 1e-2


def _check_concave(activation: Callable[[Array], Array]):
    """Refuse what is not positive, concave, or of less than linear growth."""
    seen = look_at(activation, _POINTS)
    if seen is None:
        return
    out, slope = seen
    slack = 1e-4
    is_concave = np.all(np.diff(slope) <= slack) and np.all(slope >= -slack)
    if np.any(out <= 0) or not is_concave:
        raise ValueError(
            "`activation` must be positive, increasing and concave on positive "
            f"numbers, as `jnp.tanh` and `jnp.log1p` are; got {activation!r}."
        )
    if slope[-1] > _LARGEST_SLOPE:
        raise ValueError(
            "`activation` must grow less than linearly, as `jnp.tanh` and `jnp.log1p` "
            f"do; got {activation!r}, with the slope {slope[-1]:.3g} at "
            f"{_POINTS[-1]:.0e}."
        )


class PositiveConcaveCell(eqx.Module):
    r"""A positive concave cell: one fixed point, without any norm (Gabor et al. 2024).

    $(z, x) \mapsto \sigma(|V| z + d + \mathrm{softplus}(U x + b))$ with an activation
    that is positive, increasing and concave on positive numbers and grows less than
    linearly, and a `floor` $d > 0$. The map of $z$ is then a standard interference
    mapping: for any $V$, $U$, $b$ and $x$ it has exactly one fixed point, in the
    positive orthant, and the plain iteration converges to it from any start in there.
    From zero its iterates increase. Weights of any size will do; none can be negative.

    Convergence is linear, at a rate that no norm bounds: slow where $|V|$ has a
    spectral radius close to one over the slope of the activation at the floor, and the
    floor and the injection are small.

    Cost of a call: `features * (features + in_features)` multiplications.
    """

    weight: Float[Array, "features features"]
    injection: Float[Array, "features in_features"]
    bias: Float[Array, " features"]
    activation: Callable
    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)
    floor: float = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: Callable = jnp.tanh,
        floor: RealScalarLike = 0.01,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`: The size of the input `x`, which may have any sign.
        - `features`: The size of the state `z`.
        - `activation`: Applied elementwise. Looked at in 100 positive points.
        - `floor`: Added to the injection, positive. It keeps the state off zero, where
            the map of a large weight would leave only slowly.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        for name, size in (("in_features", in_features), ("features", features)):
            check_integer(name, size, 1)
        _check_concave(activation)
        check_number("floor", floor)
        check_positive("floor", floor)
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        w_key, u_key = jr.split(key)
        # Rows of absolute values that sum to about 0.8.
        scale = jnp.asarray(1 / features, dtype)
        self.weight = scale * jr.normal(w_key, (features, features), dtype)
        scale = jnp.asarray(1 / in_features**0.5, dtype)
        self.injection = scale * jr.normal(u_key, (features, in_features), dtype)
        self.bias = jnp.zeros((features,), dtype)
        self.activation = activation
        self.in_features = in_features
        self.features = features
        self.floor = float(floor)

    def init(self, x: Float[Array, " in_features"]) -> Float[Array, " features"]:
        """The start of a solve: zero, below the fixed point."""
        return jnp.zeros((self.features,), promote(x.dtype, self.weight.dtype))

    def fused(self, x: Float[Array, " in_features"]) -> AbstractFusedCell:
        """The map at `x`, in the form that has kernels."""
        return AffineMap(jnp.abs(self.weight), self._drive(x), self.activation)

    def _drive(self, x):
        check_shape("x", x, (self.in_features,))
        return self.floor + jax.nn.softplus(self.injection @ x + self.bias)

    def __call__(
        self, z: Float[Array, " features"], x: Float[Array, " in_features"]
    ) -> Float[Array, " features"]:
        """**Arguments:**

        - `z`: The state, not negative.
        - `x`: The injected input.

        **Returns:**

        The next state, positive.
        """
        return self.activation(jnp.abs(self.weight) @ z + self._drive(x))
