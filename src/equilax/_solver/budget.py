import jax.numpy as jnp

from .._custom_types import BoolScalar, RealScalarLike


def is_budget_of(rtol: RealScalarLike, atol: RealScalarLike) -> BoolScalar:
    """Both tolerances zero: the steps are a number to be taken, not a limit."""
    return (jnp.asarray(rtol) == 0) & (jnp.asarray(atol) == 0)
