"""An implicit graph network, and the same cell applied a few times."""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from graph_data import NUM_CLASSES
from jax.experimental import sparse
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from optimiser import take_step


TOLERANCE = 1e-6
MAX_STEPS = 1000
# Of the weight, in the 2-norm: below one the cell contracts, on whatever graph.
LARGEST_NORM = 0.98
LEARNING_RATE = 1e-2
LARGEST_GRADIENT = 1.0
# States below this size are small for the readout too.
_SMALL = 1e-2

Inputs = tuple[Float[Array, "nodes classes"], sparse.BCOO]


class Equilibrium(eqx.Module):
    """The state that the cell leaves where it is: all nodes have heard of all."""

    layer: eqlx.nn.FixedPointLayer

    def __init__(self, cell: eqlx.nn.GraphCell):
        solver = eqlx.Anderson(rtol=0.0, atol=TOLERANCE)
        linear = eqlx.FixedPointLinearSolver(solver)
        self.layer = eqlx.nn.FixedPointLayer(
            cell,
            solver,
            adjoint=eqlx.ImplicitAdjoint(linear),
            # All chains take about as many steps as they have nodes, or twice that.
            batching=eqlx.Lockstep(),
            max_steps=MAX_STEPS,
        )

    def __call__(self, x: Inputs):
        sol = self.layer.solve(x)
        is_solved = sol.result == eqlx.RESULTS.successful
        return sol.value, sol.stats["num_steps"], is_solved


class Stack(eqx.Module):
    """As many graph convolutions as `depth`, of one weight: so many edges it sees."""

    cell: eqlx.nn.GraphCell
    depth: int = eqx.field(static=True)

    def __call__(self, x: Inputs):
        step = lambda z, _: (self.cell(z, x), None)
        z, _ = jax.lax.scan(step, self.cell.init(x), length=self.depth)
        return z, jnp.array(self.depth), jnp.array(True)


class Classifier(eqx.Module):
    states: Equilibrium | Stack
    readout: eqx.nn.Linear

    def __init__(self, features: int, depth: int | None, *, key: PRNGKeyArray):
        """**Arguments:**

        - `depth`: The number of convolutions. `None` is the equilibrium.
        """
        cell_key, readout_key = jr.split(key)
        cell = eqlx.nn.GraphCell(NUM_CLASSES, features, key=cell_key)
        cell = _without_bias(cell)
        self.states = Equilibrium(cell) if depth is None else Stack(cell, depth)
        self.readout = eqx.nn.Linear(features, NUM_CLASSES, key=readout_key)

    def __call__(self, x: Inputs) -> tuple[Float[Array, "nodes classes"], dict]:
        z, num_steps, is_solved = self.states(x)
        square = jnp.sum(z**2, axis=-1, keepdims=True)
        # It is the direction of a state that tells: the size falls from node to node.
        logits = jax.vmap(self.readout)(z * jax.lax.rsqrt(square + _SMALL**2))
        sizes = jnp.sqrt(square[:, 0])
        return logits, {"sizes": sizes, "steps": num_steps, "is_solved": is_solved}


def _without_bias(cell: eqlx.nn.GraphCell) -> eqlx.nn.GraphCell:
    """All nodes have the bias, and far from the first node it would hide the signal."""
    where = lambda c: c.injection.bias
    return eqx.tree_at(where, cell, replace_fn=jnp.zeros_like)


def _cell(model: Classifier) -> Any:
    states = model.states
    return states.layer.cell if isinstance(states, Equilibrium) else states.cell


def _back(cell: eqlx.nn.GraphCell) -> eqlx.nn.GraphCell:
    """To where the cell contracts, and has no bias."""
    where = lambda c: c.weight.weight
    shrink = jnp.minimum(1, LARGEST_NORM / jnp.linalg.norm(where(cell), ord=2))
    return _without_bias(eqx.tree_at(where, cell, shrink * where(cell)))


def _run(model: Classifier, inputs, labels, adjacency):
    """The loss of each node of each chain, and more of each chain."""
    logits, aux = jax.vmap(model, in_axes=((0, None),))((inputs, adjacency))
    wanted = jnp.broadcast_to(labels[:, None], logits.shape[:2])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    aux["is_correct"] = jnp.argmax(logits, axis=-1) == wanted
    return losses, aux


@eqx.filter_jit
def assess(
    model: Classifier,
    inputs: Float[Array, "chains nodes classes"],
    labels: Int[Array, " chains"],
    adjacency: sparse.BCOO,
) -> dict[str, Array]:
    losses, aux = _run(model, inputs, labels, adjacency)
    return {**aux, "losses": losses}


def make_optimiser(num_steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, num_steps)
    clip = optax.clip_by_global_norm(LARGEST_GRADIENT)
    return optax.chain(clip, optax.adam(schedule))


@eqx.filter_jit
def train_step(
    model: Classifier, opt_state: PyTree[Any], optimiser, inputs, labels, adjacency
) -> tuple[Classifier, PyTree[Any], dict[str, Array]]:
    """A step of the optimiser, then back to where the cell contracts."""

    def loss(model):
        losses, aux = _run(model, inputs, labels, adjacency)
        return jnp.mean(losses), aux

    (value, aux), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    model, opt_state = take_step(model, opt_state, grads, optimiser)
    model = eqx.tree_at(_cell, model, replace_fn=_back)
    figures = {
        "loss": value,
        "accuracy": jnp.mean(aux["is_correct"]),
        "steps": jnp.mean(aux["steps"]),
        "failed": jnp.sum(~aux["is_solved"]),
    }
    return model, opt_state, figures
