"""The equilibrium classifier, its loss, its gradient and its optimiser."""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar
from optimiser import make_adamw, take_step


TOLERANCE = 1e-6
# Below one the cell contracts: each image has one equilibrium, and each solve finds it.
LARGEST_NORM = 0.95
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1


class Classifier(eqx.Module):
    layer: eqlx.nn.FixedPointLayer
    readout: eqx.nn.Linear

    def __init__(self, features: int, *, key: PRNGKeyArray):
        cell_key, readout_key = jr.split(key)
        self.layer = eqlx.nn.FixedPointLayer(
            eqlx.nn.AffineCell(64, features, key=cell_key),
            eqlx.Anderson(rtol=TOLERANCE, atol=TOLERANCE),
            # Contracting, all images take alike many steps. One loop over the batch
            # compiles faster than the default, which suits those that do not.
            batching=eqlx.Lockstep(),
            max_steps=64,
        )
        self.readout = eqx.nn.Linear(features, 10, key=readout_key)

    def __call__(
        self, image: Float[Array, "64"], monitor: eqlx.AdjointMonitor | None = None
    ) -> tuple[Float[Array, "10"], eqlx.Solution]:
        sol = self.layer.solve(image, monitor=monitor)
        return self.readout(sol.value), sol


def cross_entropy(logits: Float[Array, "10"], label: Int[Array, ""]) -> Scalar:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _loss(
    model_and_monitors: tuple[Classifier, eqlx.AdjointMonitor],
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
) -> tuple[Scalar, dict[str, Array]]:
    model, monitors = model_and_monitors
    logits, sol = jax.vmap(model)(images, monitors)
    aux = {
        "is_correct": jnp.argmax(logits, axis=-1) == labels,
        "forward_steps": sol.stats["num_steps"],
        "is_forward_solved": sol.result == eqlx.RESULTS.successful,
    }
    return jnp.mean(jax.vmap(cross_entropy)(logits, labels)), aux


@eqx.filter_jit
def gradients(
    model: Classifier, images: Float[Array, "batch 64"], labels: Int[Array, " batch"]
) -> tuple[Classifier, dict[str, Array]]:
    """**Returns:**

    The gradient of the loss, and what happened on the way.
    """
    # What the backward pass has to say of an image is the "gradient" of its monitor.
    monitors = jax.vmap(lambda _: eqlx.AdjointMonitor())(images)
    value_and_grad = eqx.filter_value_and_grad(_loss, has_aux=True)
    (loss, aux), (grads, seen) = value_and_grad((model, monitors), images, labels)
    backward = {
        "backward_steps": seen.num_steps,
        "is_backward_solved": seen.num_failed == 0,
    }
    return grads, {**aux, **backward, "loss": loss}


def make_optimiser(num_steps: int) -> optax.GradientTransformation:
    return make_adamw(num_steps, LEARNING_RATE, WEIGHT_DECAY)


@eqx.filter_jit
def update(
    model: Classifier,
    opt_state: PyTree[Any],
    grads: Any,
    optimiser: optax.GradientTransformation,
) -> tuple[Classifier, PyTree[Any]]:
    """A step of the optimiser, then back to where the cell contracts."""
    model, opt_state = take_step(model, opt_state, grads, optimiser)
    where = lambda m: m.layer.cell.weight
    shrink = jnp.minimum(1, LARGEST_NORM / jnp.linalg.norm(where(model), ord=2))
    return eqx.tree_at(where, model, shrink * where(model)), opt_state
