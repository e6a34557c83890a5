"""The small linear least squares of Anderson's methods, by normal equations."""

import jax.numpy as jnp
from equilax_kernels import spd_solve
from jaxtyping import Array, Bool, Float

from .._custom_types import RealScalarLike


def least_squares(
    gram: Float[Array, "m m"],
    products: Float[Array, " m"],
    is_used: Bool[Array, " m"],
    ridge: RealScalarLike,
) -> Float[Array, " m"]:
    """The weights with which rows come nearest to a vector; zero for those not used.

    The equations have a unit diagonal, so that `ridge` is relative to the rows' scale.

    **Arguments:**

    - `gram`: The inner products of the rows with each other.
    - `products`: Those with the vector.
    - `is_used`: Which rows there are. One of length zero is not used either.
    - `ridge`: What is added to the diagonal, dimensionless.
    """
    lengths = jnp.diagonal(gram)
    is_used = is_used & (lengths > 0)
    scale = jnp.where(is_used, 1 / jnp.sqrt(jnp.where(is_used, lengths, 1)), 0)
    cosines = gram * jnp.outer(scale, scale)
    # A row that is not used has a scale of zero, and one on the diagonal.
    diagonal = jnp.where(is_used, jnp.asarray(ridge, gram.dtype), 1)
    cosines = cosines + jnp.diag(diagonal)
    floor = jnp.array(10 * jnp.finfo(gram.dtype).eps, gram.dtype)
    return scale * spd_solve(cosines, scale * products, floor)
