from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_integer, check_key, check_number
from .._custom_types import RealScalarLike
from .._dtype import at_least_single
from .initial import parameter_dtype
from .norm_bound import norm_bound
from .parametrisation import AbstractParametrisation
from .sample import check_shape


def onto_ball(row: Float[Array, " n"], bound: float) -> Float[Array, " n"]:
    r"""The nearest point in the two-norm whose absolute values sum to at most `bound`.

    Each is lowered by the same $\theta$, down to zero. With $s_k$ the sum of the $k$
    largest, $\theta = \max(0, \max_k (s_k - \mathrm{bound}) / k)$ (Duchi et al. 2008,
    figure 1).
    """
    sizes = jnp.abs(row).astype(at_least_single(row.dtype))
    sums = jnp.cumsum(jnp.sort(sizes, descending=True))
    counts = jnp.arange(1, row.size + 1, dtype=sums.dtype)
    theta = jnp.max((sums - bound) / counts)
    lowered = jnp.sign(row) * jnp.maximum(sizes - theta, 0).astype(row.dtype)
    # Inside nothing happens, to the derivative at zero neither.
    return jnp.where(theta > 0, lowered, row)


def _within(weight: Float[Array, "n n"], bound: float) -> Float[Array, "n n"]:
    """Scaled down to a two-norm of at most `bound`, and one within it left alone."""
    size = norm_bound(weight)
    is_over = size > bound
    return jnp.where(is_over, bound / jnp.where(is_over, size, 1), 1) * weight


def _product(matrix: Array, z: Array) -> Array:
    check_shape("z", z, (len(matrix),))
    return matrix @ z


class _Prepared(eqx.Module):
    weight: Float[Array, "features features"]

    def matrix(self) -> Float[Array, "features features"]:
        return self.weight

    def __call__(self, z: Float[Array, " features"]) -> Float[Array, " features"]:
        return _product(self.weight, z)


class ContractiveLinear(AbstractParametrisation):
    r"""A square matrix $W$ whose norm is at most `bound`, whatever its parameters.

    The parameters are projected, row by row, onto the ball of absolute values that sum
    to at most `bound`: then $\|W\|_\infty \leq \mathrm{bound}$ (El Ghaoui et al. 2021,
    sections 2.3 and 4.1), and for any activation with a slope of at most one $z \mapsto
    \sigma(W z + u)$ contracts by `bound` in [`equilax.max_norm`][], the norm in which
    solvers measure. By columns it is the 1-norm that is bounded. The projection is
    exact, and its derivative is that of it. Rows outside the ball come out sparse.

    With `axis=None` it is the two-norm, and the parameters are not projected but scaled
    down: by a bound on their norm that no power iteration has to converge to, and that
    is at most a factor of `features**(1/64)` too large, 1.1 for 256 (Delattre et al.
    2023). [`equilax.nn.SpectralNorm`][] is cheaper, and can be exceeded.

    Cost of a call: a sort of each row, or five products of matrices, and `features**2`
    multiplications. As a part of the cell of an [`equilax.nn.FixedPointLayer`][] it
    sorts, or multiplies, once a solve; what a cell closes over is no part of it, and
    does so in every evaluation. See [`equilax.nn.prepare`][].
    """

    weight: Float[Array, "features features"]
    features: int = eqx.field(static=True)
    bound: float = eqx.field(static=True)
    axis: int | None = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        bound: RealScalarLike = 0.9,
        *,
        axis: int | None = 1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `features`: The size of the state.
        - `bound`: The largest norm, in (0, 1).
        - `axis`: Along which absolute values are summed: 1 bounds the norm that belongs
            to the largest element, 0 the one that belongs to the sum. `None` bounds the
            two-norm. Keyword only argument.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        check_integer("features", features, 1)
        check_number("bound", bound)
        if not 0 < bound < 1:
            raise ValueError(f"`bound` must be in (0, 1); got {bound}.")
        if not (axis is None or (isinstance(axis, int) and axis in (0, 1))):
            raise ValueError(
                "`axis` must be 1, for rows, 0, for columns, or None, for the "
                f"two-norm; got {axis!r}."
            )
        check_key("key", key)
        dtype = parameter_dtype(dtype)
        # Absolute values sum to about the bound, so that half of the rows are inside. A
        # normal matrix of deviation s has a spectral norm of about 2 s sqrt(n).
        scale = 0.45 * bound / features**0.5
        scale = scale if axis is None else 1.25 * bound / features
        self.weight = jnp.asarray(scale, dtype) * jr.normal(
            key, (features, features), dtype
        )
        self.features = features
        self.bound = float(bound)
        self.axis = axis

    def matrix(self) -> Float[Array, "features features"]:
        """The matrix `W`."""
        if self.axis is None:
            weight = self.weight.astype(at_least_single(self.weight.dtype))
            return _within(weight, self.bound).astype(self.weight.dtype)
        project = lambda row: onto_ball(row, self.bound)
        along = 1 - self.axis
        return jax.vmap(project, along, along)(self.weight)

    def __call__(self, z: Float[Array, " features"]) -> Float[Array, " features"]:
        """**Arguments:**

        - `z`: The state.

        **Returns:**

        The product `W z`.
        """
        return _product(self.matrix(), z)

    def prepare(self) -> _Prepared:
        """The same map, its matrix formed."""
        return _Prepared(self.matrix())
