"""Where the solve of a layer begins."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._check import check_data
from .._misc import struct
from .._trace import as_state


def start(call: Callable, z0: PyTree[Any], args: PyTree[Any]) -> PyTree[Array]:
    """The initial guess, or an error if the cell does not return its like."""
    cell, x, _ = args
    check_data(x=x, z0=z0)
    init = getattr(cell, "init", None)
    if z0 is not None:
        z0 = as_state(z0, "z0")
        if init is not None:
            _check_start(z0, eqx.filter_eval_shape(init, x), "`cell.init(x)`")
        return z0
    if init is not None:
        return init(x)
    missing = "`z0` was not given and `cell` has no method `init(x) -> z0`, and "
    try:
        z0 = jtu.tree_map(jnp.zeros_like, x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{missing}there are no zeros like `x`: pass `z0`.") from error
    try:
        out = eqx.filter_eval_shape(call, z0, args)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{missing}zeros like `x` ({struct(z0)}) do not fit `cell`: pass `z0`."
        ) from error
    _check_start(z0, out, "`cell(z, x)`", "`z0` was not given; zeros like `x` are ")
    return z0


def _check_start(z0, expected, source: str, prefix: str = "`z0` has "):
    got, expected = jax.eval_shape(lambda: z0), struct(expected)
    if jtu.tree_structure(got) != jtu.tree_structure(expected) or any(
        a.shape != b.shape
        for a, b in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True)
    ):
        raise ValueError(
            f"{prefix}{struct(got)}, but {source} has {expected}: pass a `z0` like it."
        )
