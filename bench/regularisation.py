"""What a penalty on the Jacobian does to the solves of a model in training.

    python -m bench.regularisation

An equilibrium classifier of scikit-learn's digits, `z = relu(W z + U x + b)`, with
nothing that bounds `W`: trained without the penalty, and with it at two weights, from
the same parameters and on the same batches.
"""

import argparse
import functools as ft
from pathlib import Path
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from .regularisation_plot import plot
from .timing import describe


ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
HISTORY = (
    *("loss", "forward", "backward", "failed"),  # Of training, means over an epoch.
    *("accuracy", "held_out_steps", "radius"),  # Of what is held out, after it.
)
_TOLERANCE = 1e-5
_LEARNING_RATE = 1e-2
_BATCH = 64
_NUM_RADII = 64  # Held-out images of which the largest spectral radius is taken.


class Classifier(eqx.Module):
    layer: eqlx.nn.FixedPointLayer
    readout: eqx.nn.Linear

    def __init__(self, features: int, activation: str, *, key: PRNGKeyArray):
        cell_key, readout_key = jr.split(key)
        act = ACTIVATIONS[activation]
        self.layer = eqlx.nn.FixedPointLayer(
            eqlx.nn.AffineCell(64, features, act, key=cell_key),
            eqlx.Anderson(_TOLERANCE, _TOLERANCE),
            batching=eqlx.Lockstep(),
        )
        self.readout = eqx.nn.Linear(features, 10, key=readout_key)


def load_data() -> tuple[Array, ...]:
    """Images and labels to train on, then those held out."""
    digits: Any = load_digits()
    parts: Any = train_test_split(
        digits.data / 16,
        digits.target,
        train_size=1347,
        stratify=digits.target,
        random_state=0,
    )
    train, test, *labels = parts
    train_labels, test_labels = (jnp.asarray(x, jnp.int32) for x in labels)
    return jnp.asarray(train), train_labels, jnp.asarray(test), test_labels


def _loss(
    model_and_monitors: tuple[Classifier, eqlx.AdjointMonitor],
    images: Float[Array, "batch 64"],
    labels: Int[Array, " batch"],
    weight: Scalar,
    key: PRNGKeyArray,
) -> tuple[Scalar, tuple[Scalar, eqlx.Solution]]:
    model, monitors = model_and_monitors

    def one(image, monitor, key):
        sol = model.layer.solve(image, monitor=monitor)
        fn, _, args = model.layer.problem(image)
        # The penalty has no say in where the equilibrium is, as in the paper's code.
        z = lax.stop_gradient(sol.value)
        penalty = eqlx.jacobian_penalty(fn, z, args, key=key)
        return model.readout(sol.value), penalty, sol

    keys = jr.split(key, len(labels))
    logits, penalties, sol = jax.vmap(one)(images, monitors, keys)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = jnp.mean(entropy)
    return loss + weight * jnp.mean(penalties), (loss, sol)


@eqx.filter_jit
def _train_epoch(model, opt_state, batches, weight, optimiser):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, batch):
        params, opt_state = carry
        images, labels, key = batch
        monitors = jax.vmap(lambda _: eqlx.AdjointMonitor())(labels)
        both = eqx.combine(params, static), monitors
        value_and_grad = eqx.filter_value_and_grad(_loss, has_aux=True)
        (_, aux), (grads, seen) = value_and_grad(both, images, labels, weight, key)
        loss, sol = aux
        grads = eqx.filter(grads, eqx.is_inexact_array)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        failed = (sol.result != eqlx.RESULTS.successful) | (seen.num_failed > 0)
        row = (loss, sol.stats["num_steps"], seen.num_steps, failed)
        means = [jnp.mean(jnp.asarray(x, loss.dtype)) for x in row]
        return (eqx.apply_updates(params, updates), opt_state), means

    (params, opt_state), rows = lax.scan(step, (params, opt_state), batches)
    return eqx.combine(params, static), opt_state, [jnp.mean(x) for x in rows]


@eqx.filter_jit
def _assess(model, images, labels):
    def one(image):
        sol = model.layer.solve(image)
        return jnp.argmax(model.readout(sol.value)), sol

    def radius(image, z):
        fn, _, args = model.layer.problem(image)
        return eqlx.spectral_radius(fn, z, args, key=jr.key(0), num_steps=32)

    found, sol = jax.vmap(one)(images)
    radii = jax.vmap(radius)(images[:_NUM_RADII], sol.value[:_NUM_RADII])
    steps = sol.stats["num_steps"]
    return jnp.mean(found == labels), jnp.mean(1.0 * steps), jnp.max(radii)


@ft.cache  # One that is made anew is compiled anew.
def _optimiser(num_steps: int) -> optax.GradientTransformation:
    """Adam, which leaves out the batches in which a backward solve failed."""
    schedule = optax.cosine_decay_schedule(_LEARNING_RATE, num_steps)
    return optax.apply_if_finite(optax.adam(schedule), num_steps)


def run(
    weight: float,
    seed: int,
    *,
    data: tuple[Array, ...],
    epochs: int,
    features: int = 64,
    activation: str = "relu",
) -> tuple[Classifier, dict[str, np.ndarray]]:
    """Train one model. What is random depends on the seed alone, not on the weight.

    **Returns:**

    The model, and one number an epoch of each name in `HISTORY`.
    """
    images, labels, *held_out = data
    per_epoch = len(labels) // _BATCH
    optimiser = _optimiser(epochs * per_epoch)
    model = Classifier(features, activation, key=jr.key(seed))
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    rows, penalty_weight = [], jnp.asarray(weight, images.dtype)
    for epoch in range(epochs):
        order_key, key = jr.split(jr.fold_in(jr.key(seed + 1), epoch))
        order = jr.permutation(order_key, len(labels))[: per_epoch * _BATCH]
        chosen = order.reshape(per_epoch, _BATCH)
        batches = (images[chosen], labels[chosen], jr.split(key, per_epoch))
        model, opt_state, row = _train_epoch(
            model, opt_state, batches, penalty_weight, optimiser
        )
        rows.append([*row, *_assess(model, *held_out)])
    columns = np.asarray(rows, np.float64).T
    return model, dict(zip(HISTORY, columns, strict=True))


def _row(weight: float, runs: list[dict[str, np.ndarray]], first: float) -> str:
    """The last epoch of all seeds, and what share of the steps the penalty saves."""
    ends = {name: np.array([h[name][-1] for h in runs]) for name in HISTORY}
    accuracy = 100 * ends["accuracy"]
    failed = np.mean([h["failed"] for h in runs])
    return (
        f"| {weight:g} | {ends['forward'].mean():.1f} "
        f"({1 - ends['forward'].mean() / first:.0%} fewer) | "
        f"{ends['backward'].mean():.1f} | {ends['held_out_steps'].mean():.1f} | "
        f"{accuracy.mean():.1f}% ({accuracy.min():.1f} to {accuracy.max():.1f}) | "
        f"{ends['radius'].mean():.2f} | {100 * failed:.2g}% | "
        f"{ends['loss'].mean():.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0, 2.0])
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu")
    parser.add_argument("--plot", type=Path, help="the file for a figure")
    options = parser.parse_args()
    sizes = {k: getattr(options, k) for k in ("epochs", "features", "activation")}
    data, found = load_data(), {w: [] for w in options.weights}
    cases = [(w, s) for s in range(options.seeds) for w in options.weights]
    for weight, seed in tqdm(cases, desc="models", leave=False):
        found[weight].append(run(weight, seed, data=data, **sizes)[1])
    print(f"{describe()}; {options.seeds} seeds, {sizes}, float32")
    print(
        "| weight | steps, last epoch | backward | held out | accuracy | "
        "spectral radius | failed solves | loss |\n" + "|---" * 8 + "|"
    )
    first = np.mean([h["forward"][-1] for h in found[options.weights[0]]])
    for weight, runs in found.items():
        print(_row(weight, runs, float(first)))
    if options.plot is not None:
        title = f"Digits, z = {options.activation}(W z + U x + b)"
        plot(options.plot, found, title=title)


if __name__ == "__main__":
    main()
