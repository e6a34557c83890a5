"""The multiscale equilibrium classifier, its gradient, its optimiser."""

from collections.abc import Sequence
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar
from optimiser import make_adamw, take_step


TOLERANCE = 1e-4
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
GROUPS = 4
MAX_STEPS = 64


class Classifier(eqx.Module):
    """A linear map of the state of all resolutions, each averaged to 2 by 2 pixels."""

    layer: eqlx.nn.FixedPointLayer
    readout: eqx.nn.Linear

    def __init__(self, channels: Sequence[int], *, key: PRNGKeyArray):
        cell_key, readout_key = jr.split(key)
        cell = eqlx.nn.MultiscaleCell(1, channels, GROUPS, key=cell_key)
        self.layer = eqlx.nn.FixedPointLayer(
            cell,
            # The residuals are for the figure. They cost a number a step.
            eqlx.Traced(eqlx.Anderson(rtol=TOLERANCE, atol=TOLERANCE)),
            # With the penalty all images take alike many steps. One loop over the
            # batch compiles in two thirds of the time of the default.
            batching=eqlx.Lockstep(),
            max_steps=MAX_STEPS,
        )
        self.readout = eqx.nn.Linear(4 * sum(channels), 10, key=readout_key)

    def read(self, z: tuple[Float[Array, "_ _ _"], ...]) -> Float[Array, "10"]:
        quarters = [_quarters(scale).ravel() for scale in z]
        return self.readout(jnp.concatenate(quarters))


def _quarters(z: Float[Array, "c h w"]) -> Float[Array, "c 2 2"]:
    channels, height, width = z.shape
    parts = z.reshape(channels, 2, height // 2, 2, width // 2)
    return jnp.mean(parts, axis=(2, 4))


def cross_entropy(logits: Float[Array, "10"], label: Int[Array, ""]) -> Scalar:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _loss(
    model_and_monitors: tuple[Classifier, eqlx.AdjointMonitor],
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    penalty: Float[Array, ""],
    key: PRNGKeyArray,
) -> tuple[Scalar, dict[str, Array]]:
    model, monitors = model_and_monitors

    def one(image, label, monitor, key):
        image = image.reshape(1, 8, 8)
        sol = model.layer.solve(image, monitor=monitor)
        fn, _, args = model.layer.problem(image)
        z = lax.stop_gradient(sol.value)
        size = eqlx.jacobian_penalty(fn, z, args, key=key)
        logits = model.read(sol.value)
        return cross_entropy(logits, label), size, jnp.argmax(logits) == label, sol

    keys = jr.split(key, len(labels))
    losses, sizes, is_correct, sol = jax.vmap(one)(images, labels, monitors, keys)
    aux = {
        "loss": jnp.mean(losses),
        "train_accuracy": jnp.mean(is_correct),
        "jacobian": jnp.mean(sizes),
        "forward": jnp.mean(sol.stats["num_steps"]),
        "forward_worst": jnp.max(sol.stats["num_steps"]),
        "forward_failed": jnp.sum(sol.result != eqlx.RESULTS.successful),
    }
    return aux["loss"] + penalty * aux["jacobian"], aux


@eqx.filter_jit
def gradients(
    model: Classifier,
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    penalty: Float[Array, ""],
    key: PRNGKeyArray,
) -> tuple[Classifier, dict[str, Array]]:
    """**Arguments:**

    - `penalty`: The weight of the penalty on the Jacobian.
    - `key`: A PRNG key for it.

    **Returns:**

    The gradient of the loss, penalty included, and what happened on the way.
    """
    # What the backward pass has to say of an image is the "gradient" of its monitor.
    monitors = jax.vmap(lambda _: eqlx.AdjointMonitor())(labels)
    grad = eqx.filter_grad(_loss, has_aux=True)
    (grads, seen), aux = grad((model, monitors), images, labels, penalty, key)
    backward = {
        "backward": jnp.mean(seen.num_steps),
        "backward_worst": jnp.max(seen.num_steps),
        "backward_failed": jnp.sum(seen.num_failed),
    }
    return grads, {**aux, **backward}


def make_optimiser(num_steps: int) -> optax.GradientTransformation:
    return make_adamw(num_steps, LEARNING_RATE, WEIGHT_DECAY)


@eqx.filter_jit
def update(
    model: Classifier,
    opt_state: PyTree[Any],
    grads: Any,
    optimiser: optax.GradientTransformation,
) -> tuple[Classifier, PyTree[Any]]:
    return take_step(model, opt_state, grads, optimiser)


@eqx.filter_jit
def assess(
    model: Classifier, images: Float[Array, "num 64"], labels: Int[Array, " num"]
) -> dict[str, Any]:
    """The solve of each image, its states and residuals, and what is made of them."""

    def one(image, label):
        sol = model.layer.solve(image.reshape(1, 8, 8))
        logits = model.read(sol.value)
        return {
            "z": sol.value,
            "loss": cross_entropy(logits, label),
            "is_correct": jnp.argmax(logits) == label,
            "steps": sol.stats["num_steps"],
            "is_solved": sol.result == eqlx.RESULTS.successful,
            "trace": sol.stats["trace"],
        }

    return jax.vmap(one)(images, labels)
