import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree


def promote(*dtypes: Any) -> Any:
    """The dtype that holds all of `dtypes`, whatever promotion the user has set."""
    with jax.numpy_dtype_promotion("standard"):
        return ft.reduce(jnp.promote_types, dtypes)


def real(dtype: Any) -> Any:
    """The dtype of the real part."""
    return jnp.finfo(dtype).dtype


def at_least_single(dtype: Any) -> Any:
    """`dtype`, or the single precision one in place of half."""
    return promote(dtype, jnp.float32)


def residual_dtype(y: PyTree[Any]) -> Any:
    """The dtype for norms and inner products of `y`: real, and at least float32."""
    return promote(jnp.float32, *(real(x.dtype) for x in jtu.tree_leaves(y)))


def rounding(y: PyTree[Any]) -> float:
    """The relative spacing of numbers in the coarsest dtype among the leaves of `y`."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jtu.tree_leaves(y))
