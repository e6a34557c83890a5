from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._check import check_integer, check_number
from .._custom_types import RealScalarLike
from .._dtype import at_least_single


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


class ContractiveLinear(eqx.Module):
    r"""A square matrix $W$ whose norm is at most `bound`, whatever its parameters.

    The parameters are projected, row by row, onto the ball of absolute values that sum
    to at most `bound`: then $\|W\|_\infty \leq \mathrm{bound}$ (El Ghaoui et al. 2021,
    sections 2.3 and 4.1), and for any activation with a slope of at most one $z \mapsto
    \sigma(W z + u)$ contracts by `bound` in [`equilax.max_norm`][], the norm in which
    solvers measure. By columns it is the 1-norm that is bounded.

    The projection is exact, and its derivative is that of it. Rows outside the ball
    come out sparse. For a bound of the two-norm that is estimated by power iteration,
    and so can be exceeded, see `equinox.nn.SpectralNorm`.

    Cost: a sort of each row, and `features**2` multiplications. A cell that calls this
    sorts in every evaluation: where that matters, form `matrix()` once, before the
    solve, and let the function that is solved for close over it.
    """

    weight: Float[Array, "features features"]
    features: int = eqx.field(static=True)
    bound: float = eqx.field(static=True)
    axis: int = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        bound: RealScalarLike = 0.9,
        *,
        axis: int = 1,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `features`: The size of the state.
        - `bound`: The largest norm, in (0, 1).
        - `axis`: Along which absolute values are summed: 1 bounds the norm that belongs
            to the largest element, 0 the one that belongs to the sum. Keyword only
            argument.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        check_integer("features", features, 1)
        check_number("bound", bound)
        if not 0 < bound < 1:
            raise ValueError(f"`bound` must be in (0, 1); got {bound}.")
        if axis not in (0, 1):
            raise ValueError(
                f"`axis` must be 1, for rows, or 0, for columns; got {axis!r}."
            )
        dtype = jnp.zeros((), float).dtype if dtype is None else jnp.dtype(dtype)
        # Absolute values sum to about the bound, so that half of the rows are inside.
        scale = jnp.asarray(1.25 * bound / features, dtype)
        self.weight = scale * jr.normal(key, (features, features), dtype)
        self.features = features
        self.bound = float(bound)
        self.axis = axis

    def matrix(self) -> Float[Array, "features features"]:
        """The matrix `W`."""
        project = lambda row: onto_ball(row, self.bound)
        along = 1 - self.axis
        return jax.vmap(project, along, along)(self.weight)

    def __call__(self, z: Float[Array, " features"]) -> Float[Array, " features"]:
        """**Arguments:**

        - `z`: The state.

        **Returns:**

        The product `W z`.
        """
        if z.shape != (self.features,):
            raise ValueError(
                f"`z` must have the shape ({self.features},), one sample without a "
                f"batch axis; got {z.shape}. Use `jax.vmap` for a batch."
            )
        return self.matrix() @ z
