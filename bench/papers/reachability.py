"""Which nodes of a graph are connected to a marked one: models that learn it.

One cell, three ways to train it, and a readout that does without the cell.
"""

import dataclasses
from collections.abc import Callable

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Scalar


FEATURES = 8
NUM_NODES = 12  # Of a graph to train on.
BATCH = 32
NUM_STEPS = 800
LEARNING_RATE = 5e-3
TOLERANCE = 1e-4
MAX_STEPS = 60
PENALTY = 0.03  # Of the Jacobian, where the equilibrium is trained.
UNROLLED = 8
FEWEST, MOST = 6, 25  # Steps, where their number is drawn.

Graph = tuple[Bool[Array, "nodes nodes"], Float[Array, " nodes"]]


class Cell(eqx.Module):
    """A node hears, of each feature, the largest that its neighbours have."""

    own: Float[Array, "features features"]
    heard: Float[Array, "features features"]
    injection: Float[Array, " features"]
    bias: Float[Array, " features"]

    def __init__(self, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        shape, size = (FEATURES, FEATURES), 0.5 / np.sqrt(FEATURES)
        self.own = size * jr.normal(keys[0], shape)
        self.heard = size * jr.normal(keys[1], shape)
        self.injection = jr.normal(keys[2], (FEATURES,))
        self.bias = jnp.zeros(FEATURES)

    def __call__(self, z: Float[Array, "nodes features"], x: Graph):
        edges, marked = x
        heard = jnp.max(jnp.where(edges[:, :, None], z[None], -1.0), axis=1)
        injected = marked[:, None] * self.injection[None] + self.bias[None]
        return jnp.tanh(z @ self.own.T + heard @ self.heard.T + injected)


class Readout(eqx.Module):
    """A logit for each node, of its state."""

    weight: Float[Array, " features"]
    bias: Scalar

    def __init__(self, *, key: PRNGKeyArray):
        self.weight = jr.normal(key, (FEATURES,)) / np.sqrt(FEATURES)
        self.bias = jnp.zeros(())

    def __call__(self, z: Float[Array, "nodes features"], marked):
        del marked
        return z @ self.weight + self.bias


class Bypass(eqx.Module):
    """A logit for each node, of what was put in: it does not read what was solved."""

    weight: Scalar
    bias: Scalar

    def __init__(self, *, key: PRNGKeyArray):
        self.weight = jr.normal(key)
        self.bias = jnp.zeros(())

    def __call__(self, z: Float[Array, "nodes features"], marked):
        del z
        return marked * self.weight + self.bias


class Model(eqx.Module):
    cell: Cell
    readout: Readout | Bypass


def fn(z, args):
    cell, x = args
    return cell(z, x)


def zeros(x: Graph) -> Float[Array, "nodes features"]:
    return jnp.zeros((x[1].size, FEATURES))


def random_start(x: Graph, key: PRNGKeyArray) -> Float[Array, "nodes features"]:
    return jr.uniform(key, (x[1].size, FEATURES), minval=-1.0, maxval=1.0)


def equilibrium(cell: Cell, x: Graph, key: PRNGKeyArray):
    """Solved to the tolerance from a start at random, differentiated implicitly."""
    start_key, penalty_key = jr.split(key)
    linear = eqlx.FixedPointLinearSolver(eqlx.Anderson(0.0, TOLERANCE))
    sol = eqlx.fixed_point(
        fn,
        eqlx.FixedPointIteration(0.0, TOLERANCE),
        random_start(x, start_key),
        (cell, x),
        max_steps=MAX_STEPS,
        adjoint=eqlx.ImplicitAdjoint(linear),
        batching=eqlx.Lockstep(),
        throw=False,
    )
    penalty = eqlx.jacobian_penalty(fn, sol.value, (cell, x), key=penalty_key)
    return sol.value, PENALTY * penalty


def unrolled(cell: Cell, x: Graph, key: PRNGKeyArray):
    """A few steps, always as many and always from zero."""
    del key
    step = lambda z, _: (cell(z, x), None)
    return lax.scan(step, zeros(x), length=UNROLLED)[0], jnp.zeros(())


def random_steps(cell: Cell, x: Graph, key: PRNGKeyArray):
    """Start and number of steps at random (Anil et al. 2022)."""
    start_key, num_key = jr.split(key)
    num = jr.randint(num_key, (), FEWEST, MOST)
    step = lambda z, i: (jnp.where(i < num, cell(z, x), z), None)
    start = random_start(x, start_key)
    return lax.scan(step, start, jnp.arange(MOST - 1))[0], jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class Kind:
    """How states come about in training, with a term for the loss; and a readout."""

    states: Callable
    readout: type[Readout] | type[Bypass] = Readout


KINDS = {
    "equilibrium": Kind(equilibrium),
    "8 steps from zero": Kind(unrolled),
    "steps at random": Kind(random_steps),
    "no-op": Kind(equilibrium, Bypass),
}


def forests(rng: np.random.Generator, num: int, size: int) -> tuple[np.ndarray, ...]:
    """Edges, the mark of one node, and who is connected to it.

    Four in five nodes are joined to one of the three before them.
    """
    edges = np.zeros((num, size, size), bool)
    for i in range(1, size):
        other = i - 1 - rng.integers(0, 3, num)
        is_joined = (rng.random(num) < 0.8) & (other >= 0)
        which = np.flatnonzero(is_joined)
        edges[which, i, other[which]] = edges[which, other[which], i] = True
    marked = np.zeros((num, size))
    marked[np.arange(num), rng.integers(0, size, num)] = 1
    reached = marked > 0
    for _ in range(size):
        reached = reached | np.any(edges & reached[:, None], axis=2)
    return edges, marked, reached


def two_paths(length: int) -> tuple[np.ndarray, ...]:
    """Two paths, of which the first node of the first is marked."""
    edges = np.zeros((2 * length, 2 * length), bool)
    ends = [i for i in range(2 * length - 1) if i != length - 1]
    for i in ends:
        edges[i, i + 1] = edges[i + 1, i] = True
    nodes = np.arange(2 * length)
    return edges, (nodes == 0).astype(float), nodes < length


def make_step(kind: Kind, optimiser: optax.GradientTransformation):
    """A step of training, compiled once for all seeds."""

    def loss(model, graphs, keys):
        edges, marked, reached = graphs
        run = jax.vmap(lambda e, m, k: kind.states(model.cell, (e, m), k))
        zs, penalties = run(edges, marked, keys)
        logits = jax.vmap(model.readout)(zs, marked)
        wanted = reached.astype(logits.dtype)
        losses = optax.sigmoid_binary_cross_entropy(logits, wanted)
        return jnp.mean(losses) + jnp.mean(penalties)

    @eqx.filter_jit
    def step(model, opt_state, graphs, key):
        keys = jr.split(key, graphs[0].shape[0])
        grads = eqx.filter_grad(loss)(model, graphs, keys)
        updates, opt_state = optimiser.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state

    return step


def train(kind: Kind, seeds: range, num_steps: int, tick: Callable) -> list[Model]:
    """A model for each seed.

    **Arguments:**

    - `tick`: Called after each step, for a progress bar.
    """
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, num_steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    # A solve that does not converge may end anywhere: those batches are left out.
    optimiser = optax.apply_if_finite(adam, max_consecutive_errors=num_steps)
    step, models = make_step(kind, optimiser), []
    for seed in seeds:
        cell_key, readout_key, key = jr.split(jr.key(seed), 3)
        model = Model(Cell(key=cell_key), kind.readout(key=readout_key))
        opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
        rng = np.random.default_rng(seed)
        for i in range(num_steps):
            graphs = tuple(map(jnp.asarray, forests(rng, BATCH, NUM_NODES)))
            model, opt_state = step(model, opt_state, graphs, jr.fold_in(key, i))
            tick()
        models.append(model)
    return models
