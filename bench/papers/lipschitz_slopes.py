"""Layers with a bound on their slope, and the largest slope that can be found."""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax


INPUTS, UNITS, OUTPUTS = 8, 32, 4
NUM_SEEDS, NUM_PAIRS, NUM_CLIMBERS, DISTANCE = 3, 1000, 16, 0.1
NUM_STEPS, RATE = 200, 1e-2
_SOLVER = eqlx.FixedPointIteration(0.0, 1e-10)
_MAX_STEPS = 20_000
_HOW: dict[str, Any] = {
    "adjoint": eqlx.ImplicitAdjoint(
        eqlx.FixedPointLinearSolver(_SOLVER, max_steps=_MAX_STEPS)
    ),
    "batching": eqlx.Lockstep(),
    "max_steps": _MAX_STEPS,
}


def bounded(gamma: float, num: int = NUM_SEEDS):
    """Layers of Revay et al., one for each seed, as one module with a leading axis."""

    def make(key):
        return eqlx.nn.LipschitzBoundedLayer(
            INPUTS,
            UNITS,
            OUTPUTS,
            gamma,
            eqlx.nn.PeacemanRachford(),
            _SOLVER,
            key=key,
            **_HOW,
        )

    return eqx.filter_vmap(make)(_keys(num))


def monotone(margin: float, num: int = NUM_SEEDS):
    """Monotone layers likewise."""

    def make(key):
        keys = jr.split(key)
        return eqlx.nn.MonotoneLayer(
            eqlx.nn.MonotoneLinear(UNITS, margin, key=keys[0]),
            eqx.nn.Linear(INPUTS, UNITS, key=keys[1]),
            eqlx.nn.PeacemanRachford(),
            _SOLVER,
            **_HOW,
        )

    return eqx.filter_vmap(make)(_keys(num))


def _keys(num):
    return jax.vmap(jr.key)(jnp.arange(num))


def bound(layer) -> Any:
    """What one layer promises."""
    if isinstance(layer, eqlx.nn.LipschitzBoundedLayer):
        return jnp.asarray(layer.gamma)
    return jnp.linalg.norm(layer.injection.weight, 2) / layer.linear.margin


def slope(layer, x, step) -> Any:
    moved = layer(x + step) - layer(x)
    return jnp.linalg.norm(moved) / jnp.linalg.norm(step)


@eqx.filter_jit
def tightness(layers, xs, steps) -> Any:
    """The slopes divided by the bounds: a row for each layer, of the same pairs."""

    def of_one(layer):
        return jax.vmap(lambda x, step: slope(layer, x, step))(xs, steps) / bound(layer)

    return eqx.filter_vmap(of_one)(layers)


def pairs(key, num: int) -> tuple[Any, Any]:
    """Points and steps from them, of lengths of 0.01 to 10."""
    x_key, d_key, r_key = jr.split(key, 3)
    steps = jr.normal(d_key, (num, INPUTS))
    sizes = 10 ** jr.uniform(r_key, (num, 1), minval=-2.0, maxval=1.0)
    steps = sizes * steps / jnp.linalg.norm(steps, axis=1, keepdims=True)
    return jr.normal(x_key, (num, INPUTS)), steps


def _adam(loss, start, rate: float, num_steps: int):
    optimiser = optax.adam(rate)

    def step(carry, i):
        params, opt_state = carry
        updates, opt_state = optimiser.update(jax.grad(loss)(params, i), opt_state)
        return (eqx.apply_updates(params, updates), opt_state), None

    init = (start, optimiser.init(start))
    return lax.scan(step, init, jnp.arange(num_steps))[0][0]


@eqx.filter_jit
def climb(layers, xs, steps, num_steps: int = 100) -> Any:
    """The tightness at pairs of a fixed distance that follow its gradient."""

    def of_one(layer, x, step):
        def loss(pair, _):
            x, step = pair
            return -jnp.log(slope(layer, x, DISTANCE * step / jnp.linalg.norm(step)))

        x, step = _adam(loss, (x, step / jnp.linalg.norm(step)), 0.05, num_steps)
        return jnp.exp(-loss((x, step), 0)) / bound(layer)

    return eqx.filter_vmap(
        lambda layer, xs, steps: jax.vmap(lambda x, step: of_one(layer, x, step))(
            xs, steps
        )
    )(layers, xs, steps)


@eqx.filter_jit
def train(layers, num_steps: int = NUM_STEPS, num_pairs: int = 16):
    """The layers after Adam on minus the mean logarithm of their tightness."""

    def of_one(layer, key):
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        def loss(params, i):
            layer = eqx.combine(params, static)
            xs, steps = pairs(jr.fold_in(key, i), num_pairs)
            slopes = jax.vmap(lambda x, step: slope(layer, x, step))(xs, steps)
            return jnp.log(bound(layer)) - jnp.mean(jnp.log(slopes))

        return eqx.combine(_adam(loss, params, RATE, num_steps), static)

    num = len(jtu.tree_leaves(eqx.filter(layers, eqx.is_inexact_array))[0])
    return eqx.filter_vmap(of_one)(layers, _keys(num))


def singular_values(layer, xs) -> np.ndarray:
    """The largest of the Jacobian at each point, by NumPy with a dense inverse.

    The solve of the layer says which units are active, and nothing else.
    """
    zs = np.asarray(jax.vmap(layer.solve)(xs).value)
    if isinstance(layer, eqlx.nn.LipschitzBoundedLayer):
        weight, injection = layer.matrix(), layer.injection
        output = np.asarray(layer.output)
    else:
        weight, injection = layer.linear.matrix(), layer.injection.weight
        output = np.eye(UNITS)
    active = (zs > 0)[:, :, None].astype(float)
    systems = np.eye(UNITS) - active * np.asarray(weight)
    jacobians = output @ np.linalg.solve(systems, active * np.asarray(injection))
    return np.linalg.norm(jacobians, 2, axis=(1, 2))


def measure(layers, num_pairs: int = NUM_PAIRS) -> dict[str, np.ndarray]:
    """The largest tightness of each layer that each way finds."""
    xs, steps = pairs(jr.key(1), num_pairs)
    found = np.asarray(tightness(layers, xs, steps))
    best = np.argsort(-found, axis=1)[:, :NUM_CLIMBERS]
    climbed = climb(layers, xs[best], steps[best])
    values = []
    for i in range(len(found)):
        take = lambda x, i=i: x[i] if eqx.is_array(x) else x
        layer = jtu.tree_map(take, layers)
        values.append(np.max(singular_values(layer, xs)) / float(bound(layer)))
    return {
        "random pairs": np.max(found, axis=1),
        "climbing pairs": np.max(np.asarray(climbed), axis=1),
        "Jacobian": np.array(values),
    }
