"""A step of data-parallel training, and the assessment at the end.

The model, its loss of a sample and its optimiser are those of `digits.py`, which knows
of one device. `eqlx.sharding.shard_vmap` in the place of `jax.vmap` is the difference.
"""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from digits_model import Classifier, cross_entropy, make_optimiser, update
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree, Scalar
from sharded_processes import AXIS, replicated


class State(eqx.Module):
    """What training changes. The same on all devices."""

    model: Classifier
    opt_state: PyTree[Any]


@eqx.filter_jit
def start(features: int, seed: int, num_steps: int, mesh: Mesh) -> State:
    # Under `jit`, so that all processes together make arrays that belong to all.
    model = Classifier(features, key=jr.key(seed))
    params = eqx.filter(model, eqx.is_inexact_array)
    state = State(model, make_optimiser(num_steps).init(params))
    return eqx.filter_shard(state, replicated(mesh))


def _sample(
    model: Classifier,
    image: Float[Array, "64"],
    label: Int[Array, ""],
    monitor: eqlx.AdjointMonitor | None = None,
) -> tuple[Scalar, dict[str, Array]]:
    logits, sol = model(image, monitor)
    return cross_entropy(logits, label), {
        "is_correct": jnp.argmax(logits) == label,
        "num_steps": sol.stats["num_steps"],
        "has_failed": sol.result != eqlx.RESULTS.successful,
    }


def _loss(model_and_monitors, images, labels, mesh):
    model, monitors = model_and_monitors
    run = eqlx.sharding.shard_vmap(_sample, mesh, AXIS, in_axes=(None, 0, 0, 0))
    losses, aux = run(model, images, labels, monitors)
    return jnp.mean(losses), aux


@eqx.filter_jit
def train_step(
    state: State,
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    num_steps: int,
    mesh: Mesh,
) -> tuple[State, dict[str, Scalar]]:
    """**Returns:**

    The next state, and figures of the batch, which all processes can read.
    """
    # What the backward pass has to say of an image is the "gradient" of its monitor.
    monitors = jax.vmap(lambda _: eqlx.AdjointMonitor())(images)
    value_and_grad = eqx.filter_value_and_grad(_loss, has_aux=True)
    (loss, aux), (grads, seen) = value_and_grad(
        (state.model, monitors), images, labels, mesh
    )
    optimiser = make_optimiser(num_steps)
    state = State(*update(state.model, state.opt_state, grads, optimiser))
    figures = {
        "loss": loss,
        "accuracy": jnp.mean(aux["is_correct"]),
        "forward_steps": jnp.mean(aux["num_steps"]),
        "forward_steps_worst": jnp.max(aux["num_steps"]),
        "failed_forward": jnp.sum(aux["has_failed"]),
        "backward_steps": jnp.mean(seen.num_steps),
        "backward_steps_worst": jnp.max(seen.num_steps).astype(int),
        "failed_backward": jnp.sum(seen.num_failed).astype(int),
    }
    return eqx.filter_shard((state, figures), replicated(mesh))


@eqx.filter_jit
def assess(
    model: Classifier,
    images: Float[Array, "held_out 64"],
    labels: Int[Array, " held_out"],
    mesh: Mesh,
) -> dict[str, Scalar]:
    """Of images whose number the devices need not divide."""
    run = eqlx.sharding.shard_vmap(_sample, mesh, AXIS, in_axes=(None, 0, 0))
    losses, aux = run(model, images, labels)
    figures = {
        "held_out_loss": jnp.mean(losses),
        "held_out_accuracy": jnp.mean(aux["is_correct"]),
        "held_out_failed": jnp.sum(aux["has_failed"]),
    }
    return eqx.filter_shard(figures, replicated(mesh))
