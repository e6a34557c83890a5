"""Our part of `digits_methods`: the model, and its training."""

import dataclasses
import functools as ft
import time
from collections.abc import Callable
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from . import digits_split as split


_SOLVERS = {"plain": eqlx.FixedPointIteration, "Anderson": eqlx.Anderson}
# The least 2-norm of an adjoint's solution for a cotangent whose largest element is
# one, which is what the linear solver makes of each.
_LEAST = 4.0


def _solver(name: str, size: Any) -> Any:
    """A solver with a tolerance relative to the 2-norm of a state, as TorchDEQ has it.

    Our own `rtol` is relative to each element, of which ReLU makes many that are zero.

    **Arguments:**

    - `size`: That norm, or less than it.
    """
    return _SOLVERS[name](0.0, split.TOLERANCE * size, norm=eqlx.two_norm)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is solved and differentiated.

    **Attributes:**

    - `penalty`: The weight of the penalty on the Jacobian.
    """

    method: str
    solver: str = "plain"
    batching: eqlx.AbstractBatching = eqlx.Lockstep()
    penalty: float = 0.0

    def adjoint(self) -> eqlx.ImplicitAdjoint:
        solve = _solver(self.solver, _LEAST)
        solvers = {
            "implicit": eqlx.FixedPointLinearSolver(solve, max_steps=split.MAX_STEPS),
            # A term is a step of backpropagation; the first step is the layer's own.
            "phantom": eqlx.Neumann(split.TERMS - 1, damp=split.DAMP),
            "one step": eqlx.Neumann(0),
        }
        return eqlx.ImplicitAdjoint(solvers[self.method])


class Classifier(eqx.Module):
    layer: eqlx.nn.FixedPointLayer
    readout: eqx.nn.Linear

    def __init__(self, way: Way, *, key):
        *keys, readout_key = jr.split(key, 3)
        cell = eqlx.nn.AffineCell(
            64, split.UNITS, jax.nn.relu, dtype=jnp.float32, key=key
        )
        # The initial weights of PyTorch's `Linear`.
        where = lambda cell: (cell.weight, cell.injection)
        weights = [
            jr.uniform(k, w.shape, w.dtype, -1, 1)
            * jnp.asarray(w.shape[1] ** -0.5, w.dtype)
            for k, w in zip(keys, where(cell), strict=True)
        ]
        self.layer = eqlx.nn.FixedPointLayer(
            eqx.tree_at(where, cell, weights),
            _solver(way.solver, 1.0),
            adjoint=way.adjoint(),
            batching=way.batching,
            max_steps=split.MAX_STEPS,
        )
        self.readout = eqx.nn.Linear(
            split.UNITS, split.CLASSES, dtype=jnp.float32, key=readout_key
        )

    def normalised(self, way: Way, u: Array, size: Array) -> eqlx.nn.FixedPointLayer:
        """The layer to solve, for states of at least this size.

        The weight is divided by an estimate of its norm from the left singular vector
        `u`, through which the gradient goes but for the vectors, as in TorchDEQ.
        """
        cell: Any = self.layer.cell
        weight = cell.weight
        v = lax.stop_gradient(weight).T @ u
        norm = u @ weight @ (v / jnp.linalg.norm(v))
        where = lambda layer: (layer.cell.weight, layer.solver)
        new = split.NORM / norm * weight, _solver(way.solver, size)
        return eqx.tree_at(where, self.layer, new)


class Carry(eqx.Module):
    """What a step passes on.

    **Attributes:**

    - `u`: The left singular vector of the weight, by a power iteration a step.
    - `size`: The least 2-norm of a state in the last batch.
    """

    params: Any
    opt_state: Any
    u: Array
    size: Array
    key: Array


def _loss(model, way, carry, images, labels, key):
    layer = model.normalised(way, carry.u, carry.size)
    sol = jax.vmap(layer.solve)(images)
    logits = jax.vmap(model.readout)(sol.value)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    if way.penalty:

        def of_one(x, z, key):
            fn, _, args = layer.problem(x)
            return eqlx.jacobian_penalty(fn, z, args, key=key)

        at = lax.stop_gradient(sol.value)
        penalties = jax.vmap(of_one)(images, at, jr.split(key, len(images)))
        loss = loss + way.penalty * jnp.mean(penalties)
    size = jnp.min(jnp.linalg.norm(sol.value, axis=1))
    return loss, (sol.stats["num_fn_evals"], lax.stop_gradient(size))


class Programs:
    """A step of training and an assessment, compiled once for all seeds."""

    def __init__(self, way: Way):
        self.way = way
        self._optimiser = optax.adam(split.RATE)
        self._static = self._split(jr.key(0))[1]
        images, _, labels, _ = split.load()
        batch = images[: split.BATCH], labels[: split.BATCH]
        start = self.start(0)
        began, cpu = time.perf_counter(), time.process_time()
        self.step: Callable = jax.jit(self._step).lower(start, *batch).compile()
        self.seconds = time.perf_counter() - began
        self.cpu = time.process_time() - cpu
        jax.block_until_ready(self.step(start, *batch))
        self.assess: Callable = jax.jit(self._assess)

    def _split(self, key):
        return eqx.partition(Classifier(self.way, key=key), eqx.is_inexact_array)

    def start(self, seed: int) -> Carry:
        model_key, u_key, key = jr.split(jr.key(seed), 3)
        params, _ = self._split(model_key)
        u = jr.normal(u_key, (split.UNITS,), jnp.float32)
        size = jnp.ones((), jnp.float32)
        return Carry(params, self._optimiser.init(params), u, size, key)

    def _step(self, carry, images, labels):
        key, use = jr.split(carry.key)
        weight = carry.params.layer.cell.weight
        u = weight @ (weight.T @ carry.u)
        now = dataclasses.replace(carry, u=u / jnp.linalg.norm(u))

        def loss(params):
            model = eqx.combine(params, self._static)
            return _loss(model, self.way, now, images, labels, use)

        grads, (evals, size) = jax.grad(loss, has_aux=True)(carry.params)
        updates, opt_state = self._optimiser.update(grads, carry.opt_state)
        params = eqx.apply_updates(carry.params, updates)
        return Carry(params, opt_state, now.u, size, key), evals

    def _assess(self, carry, images):
        model = eqx.combine(carry.params, self._static)
        layer = model.normalised(self.way, carry.u, carry.size)
        sol = jax.vmap(layer.solve)(images)
        return jax.vmap(model.readout)(sol.value), sol.stats["num_fn_evals"]


programs = ft.cache(Programs)


def train(way: Way, seed: int, epochs: int = split.EPOCHS) -> dict[str, float]:
    """As in `digits_torchdeq`: a call of a compiled program a step."""
    images, held_out, labels, expected = split.load()
    run = programs(way)
    carry, evals = run.start(seed), []
    began, cpu = time.perf_counter(), time.process_time()
    for epoch in range(epochs):
        for chosen in split.batches(len(labels), seed, epoch):
            carry, seen = run.step(carry, images[chosen], labels[chosen])
            evals.append(seen)
    jax.block_until_ready(carry)
    found = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
    }
    logits, held_out_evals = run.assess(carry, held_out)
    is_right = np.argmax(np.asarray(logits), axis=1) == expected
    return found | {
        "accuracy": float(np.mean(is_right)),
        "evals": float(np.max(held_out_evals)),
        "mean evals": float(np.mean(held_out_evals)),
        "training evals": float(np.mean(evals)),
    }
