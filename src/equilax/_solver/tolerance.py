from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._check import is_readable
from .._custom_types import BoolScalar, RealScalarLike


def is_budget_of(rtol: RealScalarLike, atol: RealScalarLike) -> BoolScalar:
    """Both tolerances zero: the steps are a number to be taken, not a limit."""
    return (jnp.asarray(rtol) == 0) & (jnp.asarray(atol) == 0)


def tolerance_as(dtype: Any, value: RealScalarLike) -> Float[Array, ""]:
    """A tolerance to measure by. What is below zero is one that nothing reaches."""
    if is_readable(value):
        return jnp.asarray(value if value >= 0 else jnp.nan, dtype)
    tolerance = jnp.asarray(value, dtype)
    return jnp.where(tolerance < 0, jnp.nan, tolerance)
