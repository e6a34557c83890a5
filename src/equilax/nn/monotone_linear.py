import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_integer, check_key, check_number, check_positive
from .._custom_types import RealScalarLike
from .initial import parameter_dtype
from .monotone_map import AbstractMonotoneMap, DenseMap


class AbstractMonotoneLinear(eqx.Module):
    """Abstract base class for linear maps `W`, of which `I - W` is strongly monotone.

    **Attributes:**

    - `margin`: The modulus of monotonicity.
    """

    margin: eqx.AbstractVar[float]

    @abc.abstractmethod
    def prepare(self, shape: tuple[int, ...]) -> AbstractMonotoneMap:
        """Form `W` for states of this shape, or an error if there can be none."""


class MonotoneLinear(AbstractMonotoneLinear):
    r"""A square matrix $W$ for which $z = \sigma(W z + u)$ has one solution.

    $W = (1 - m) I - A^T A + B - B^T$ with any $A$ and $B$, so that $\langle z, (I - W)
    z \rangle \geq m \|z\|^2$ (Winston and Kolter 2020, proposition 1). For any
    $\sigma$ with a slope in [0, 1] and any $u$ there is then a unique solution, even
    where $\|W\|$ is large; [`equilax.nn.MonotoneLayer`][] finds it.

    Cost: $W$ takes `features**3` multiplications to form; a call forms it.
    """

    a: Float[Array, "features features"]
    b: Float[Array, "features features"]
    features: int = eqx.field(static=True)
    margin: float = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        margin: RealScalarLike = 1.0,
        *,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `features`: The size of the state `z`.
        - `margin`: The modulus `m` of monotonicity, positive. A small one leaves `W`
            free, and takes more steps.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        check_integer("features", features, 1)
        check_number("margin", margin)
        check_positive("margin", margin)
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        scale = jnp.asarray(0.5 / features**0.5, dtype)
        a_key, b_key = jr.split(key)
        # Spectral norms of about one for A, and of 1.4 for B - B^T.
        self.a = scale * jr.normal(a_key, (features, features), dtype)
        self.b = scale * jr.normal(b_key, (features, features), dtype)
        self.features = features
        self.margin = float(margin)

    def matrix(self) -> Float[Array, "features features"]:
        """The matrix `W`."""
        eye = jnp.eye(self.features, dtype=self.a.dtype)
        return (1 - self.margin) * eye - self.a.T @ self.a + self.b - self.b.T

    def prepare(self, shape):
        if shape != (self.features,):
            raise ValueError(
                f"`linear` maps states of the shape ({self.features},); got a state of "
                f"the shape {shape}. Use `jax.vmap` for a batch."
            )
        return DenseMap(weight=self.matrix(), margin=self.margin)

    def __call__(self, z: Float[Array, " features"]) -> Float[Array, " features"]:
        """**Arguments:**

        - `z`: The state.

        **Returns:**

        The product `W z`.
        """
        return self.prepare(z.shape).mv(z)
