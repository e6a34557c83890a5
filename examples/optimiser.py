"""The optimiser that the examples share, and a step of any."""

from typing import Any, TypeVar

import equinox as eqx
import optax
from jaxtyping import PyTree


M = TypeVar("M")


def make_adamw(
    num_steps: int, learning_rate: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW, which leaves out the batches in which a backward solve failed."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    optimiser = optax.adamw(schedule, weight_decay=weight_decay)
    return optax.apply_if_finite(optimiser, max_consecutive_errors=10)


def take_step(
    model: M,
    opt_state: PyTree[Any],
    grads: Any,
    optimiser: optax.GradientTransformation,
) -> tuple[M, PyTree[Any]]:
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state
