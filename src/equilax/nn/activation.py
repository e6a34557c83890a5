"""What an activation does on some points, at the time a layer is made."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .._check import check_callable


def look_at(
    activation: Callable[[Array], Array], points: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and slopes at `points`, or an error if it isn't elementwise.

    `None` if it has parameters that are traced, or in a `jax.vmap`, which makes a layer
    for each of several keys: there it isn't looked at.
    """
    check_callable("activation", activation, "activation(z)")
    with jax.ensure_compile_time_eval():
        x = jnp.asarray(points)
        out, slope = jax.jvp(activation, (x,), (jnp.ones_like(x),))
        alone = activation(x[:1])
    if jnp.shape(out) != points.shape:
        raise ValueError(
            f"`activation` must act elementwise; it maps the shape {points.shape} to "
            f"{jnp.shape(out)}."
        )
    if any(isinstance(x, Tracer) for x in (out, slope, alone)):
        return None
    out, slope, alone = map(np.asarray, (out, slope, alone))
    if not np.allclose(out[:1], alone, rtol=1e-3):
        raise ValueError(
            "`activation` must act elementwise; the first of several elements has the "
            f"value {out[0]:.3g}, and the same alone {alone[0]:.3g}."
        )
    return out, slope
