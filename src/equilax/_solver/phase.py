"""Which of several methods is at work, and how much each gains by an evaluation."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from .._custom_types import BoolScalar, IntScalar
from .base import Evaluation


# An evaluation that changes the residual by less gains nothing.
_NO_GAIN = 1e-3
# What has not been tried is tried before it is judged.
_UNKNOWN = 1e9
# How far from the best iterate a method has gone astray.
_ASTRAY = 1e4


class Phase(eqx.Module):
    """The method in use.

    **Attributes:**

    - `method`: Its number.
    - `slopes`: For each method the logarithm of the factor by which an evaluation
        changed the residual when it was last in use. Where it gained nothing, how often
        in a row.
    - `num_steps`, `num_evals`: Steps and evaluations since this was last measured.
    - `start`: The residual then, infinite before the first.
    - `best`: The smallest since then.
    - `num_broken`: How often a method led to where `fn` has no value.
    """

    method: IntScalar
    slopes: Float[Array, " num"]
    num_steps: IntScalar
    num_evals: IntScalar
    start: Scalar
    best: Scalar
    num_broken: IntScalar


def begin(num_methods: int, dtype: Any) -> Phase:
    """The first method, and the others in the order in which they are to be tried."""
    inf, zero = jnp.array(jnp.inf, dtype), jnp.zeros((), jnp.int32)
    slopes = jnp.full((num_methods,), -_UNKNOWN, dtype).at[0].set(0).at[-1].set(0)
    return Phase(zero, slopes, zero, zero, inf, inf, zero)


def advance(
    now: Phase,
    at: Evaluation,
    is_refused: BoolScalar,
    windows: Int[Array, " num"],
    fast: float,
) -> Phase:
    """Judge the method by the iterate to which it led, and choose the next.

    **Arguments:**

    - `is_refused`: Whether the method takes its last step back, and is not done with
        it.
    - `windows`: After how many steps each method is measured.
    - `fast`: The slope with which the first method is good enough.
    """
    residual = at.residual.astype(now.start.dtype)
    is_begun = jnp.isfinite(now.start)
    is_astray = ~at.is_finite | (at.residual > _ASTRAY * at.best_residual)
    is_broken = is_begun & ~is_refused & is_astray
    is_seen = at.is_finite & ~is_refused
    best = jnp.where(is_seen, jnp.minimum(now.best, residual), now.best)
    num_steps, num_evals = now.num_steps + 1, now.num_evals + 1
    is_over = is_begun & ~is_refused & (num_steps >= windows[now.method])
    is_over = is_over | is_broken

    gain = best / jnp.where(is_begun, now.start, 1)
    gain = jnp.where(gain > 0, gain, jnp.finfo(gain.dtype).tiny)
    slope = jnp.log(gain) / num_evals.astype(gain.dtype)
    is_vain = is_broken | (slope > -_NO_GAIN)
    number = jnp.arange(now.slopes.shape[0], dtype=jnp.int32)
    is_present = number == now.method
    failures = jnp.maximum(now.slopes, 0) + 1
    measured = jnp.where(is_vain, failures, slope)
    slopes = jnp.where(is_over & is_present, measured, now.slopes)
    # To stay is better than to go for little.
    biased = jnp.where(is_present, jnp.minimum(2 * slopes, slopes), slopes)
    chosen = jnp.argmin(biased).astype(jnp.int32)
    is_fast = (now.method == 0) & (slope < fast) & ~is_vain
    method = jnp.where(is_over & ~is_fast, chosen, now.method)

    is_new = is_over | ~is_begun
    # A method that goes on is measured against what it has reached; another against
    # where it begins, which is not known yet if it is to begin at the best iterate.
    is_lost = (method != now.method) & ~(at.residual <= 2 * at.best_residual)
    begun = jnp.where(method == now.method, jnp.minimum(best, now.start), residual)
    begun = jnp.where(is_lost, jnp.inf, begun)
    begun = jnp.where(is_begun | is_lost, begun, residual)
    return Phase(
        method=method,
        slopes=slopes,
        num_steps=jnp.where(is_new, 0, num_steps),
        num_evals=jnp.where(is_new, 0, num_evals),
        start=jnp.where(is_new, begun, now.start),
        best=jnp.where(is_new, begun, best),
        num_broken=now.num_broken + is_broken.astype(jnp.int32),
    )
