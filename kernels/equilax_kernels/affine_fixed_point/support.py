"""What any kernel takes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .activations import is_known
from .rules import Settings


_DTYPES = (jnp.float32, jnp.bfloat16)
_PRECISIONS = (lax.Precision.DEFAULT, lax.Precision.HIGHEST)
MAX_HISTORY = 5


def resolved(precision: lax.Precision | None) -> Any:
    """The precision of a product that asks for none: that which the user has set."""
    config: Any = jax.config
    name = config.jax_default_matmul_precision
    if precision is not None or name is None:
        return lax.Precision.DEFAULT if precision is None else precision
    try:
        return lax.Precision(name)
    except ValueError:  # The name of an algorithm, which products resolve themselves.
        return None


def unsupported(u: Any, settings: Settings) -> str | None:
    """Why no kernel takes these, or `None` if one may. Reads no values."""
    if u.dtype not in _DTYPES:
        return f"the dtype is {u.dtype}, not float32 or bfloat16"
    if not is_known(settings.activation):
        return f"the activation {settings.activation} is not one of the kernels'"
    if settings.precision not in _PRECISIONS:
        return f"the precision {settings.precision} is neither DEFAULT nor HIGHEST"
    if settings.history_length > MAX_HISTORY:
        return f"the history of {settings.history_length} is over {MAX_HISTORY}"
    return "there is nothing to solve" if u.size == 0 else None
