import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._mesh import to_vary, varying
from . import extrapolation, rules
from .rules import Knobs, Settings


def _put(ring, slot, row):
    ring = lax.dynamic_update_index_in_dim(ring, row.astype(ring.dtype), slot, 0)
    return ring, list(ring)


def affine_fixed_point(
    weight: Float[Array, "d d"],
    u: Float[Array, "rows d"],
    z0: Float[Array, "rows d"],
    scale: Float[Array, "rows d"] | None,
    knobs: Knobs,
    settings: Settings,
) -> tuple[Array, Array, Array, Array]:
    """The definition: all rows in one loop, with all of it in memory."""
    axes = varying(*jax.tree.leaves((weight, u, z0, scale, knobs)))
    dtype = jnp.result_type(knobs.rtol)
    activation = settings.activation or (lambda x: x)

    def fn(z):
        return rules.image(z, weight, u, scale, activation, settings.precision, dtype)

    def begin():
        rows = rules.start(z0, jnp.full((z0.shape[0], 1), True), dtype)
        if settings.history_length == 0:
            return jnp.int32(0), rows, ()
        ring = jnp.zeros((settings.history_length, *z0.shape), z0.dtype)
        wide = jnp.zeros(z0.shape, dtype)
        memory = extrapolation.empty((ring, ring), settings.history_length, wide)
        return jnp.int32(0), rows, memory

    step = rules.damped
    if settings.history_length > 0:
        step = ft.partial(
            extrapolation.extrapolated, put=_put, is_damped=settings.is_damped
        )

    def body(carry):
        num_steps, rows, memory = carry
        rows, memory = rules.advance(
            rows, memory, num_steps, fn, step, knobs, settings.max_steps
        )
        return vary((num_steps + 1, rows, memory))

    # Devices take different numbers of steps: all of a carry differs between them.
    vary = lambda carry: jax.tree.map(lambda x: to_vary(x, axes), carry)
    going_on = lambda carry: jnp.any(rules.is_live(carry[1]))
    _, rows, _ = lax.while_loop(going_on, body, vary(begin()))
    z, residual = rules.finish(rows)
    return z, rows.num_steps[:, 0], residual[:, 0], rows.status[:, 0]
