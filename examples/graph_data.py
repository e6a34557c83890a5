"""Chains of nodes whose class only the first node knows."""

import equilax as eqlx
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse


NUM_CLASSES = 2
_NOISE = 0.3


def chain(num_nodes: int) -> sparse.BCOO:
    """The normalised adjacency of a chain: each node listens to the one before it."""
    nodes = np.arange(num_nodes - 1)
    edges = jnp.asarray(np.stack([nodes + 1, nodes], axis=1))
    weights = jnp.ones(num_nodes - 1)
    matrix = sparse.BCOO((weights, edges), shape=(num_nodes, num_nodes))
    return eqlx.nn.normalise_adjacency(matrix)


def batch(
    num_chains: int, num_nodes: int, *, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, `(chain, node, class)`, zero but for each first node; and labels.

    They depend on the arguments alone, so a step that is done again after a crash is
    the step that it would have been.
    """
    rng = np.random.default_rng([seed, step])
    labels = rng.integers(0, NUM_CLASSES, num_chains)
    inputs = np.zeros((num_chains, num_nodes, NUM_CLASSES), np.float32)
    noise = _NOISE * rng.standard_normal((num_chains, NUM_CLASSES))
    inputs[:, 0] = np.eye(NUM_CLASSES)[labels] + noise
    return inputs, labels.astype(np.int32)
