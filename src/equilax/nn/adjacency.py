from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jax.experimental import sparse
from jaxtyping import Array, Float

from .._custom_types import RealScalarLike
from .._dtype import at_least_single


# The one kind or the other.
Adjacency = TypeVar("Adjacency", Float[Array, "rows columns"], sparse.BCOO)


def check_adjacency(adjacency: Adjacency):
    """Refuse what is not square, or holds no floating-point numbers."""
    shape = adjacency.shape
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            "`adjacency` must be a square matrix, with a row and a column for each "
            f"node; got the shape {shape}."
        )
    if not jnp.issubdtype(adjacency.dtype, jnp.floating):
        raise ValueError(
            f"`adjacency` must have a floating-point dtype; got {adjacency.dtype}."
        )


def normalise_adjacency(
    adjacency: Adjacency, self_weight: RealScalarLike = 1.0
) -> Adjacency:
    r"""Scale the weights of a graph so that their matrix has a norm of at most one.

    $D^{-1/2} (A + s I) E^{-1/2}$ with $D$ the row sums and $E$ the column sums of
    $A + s I$, the same for a symmetric one (Kipf and Welling 2017, equation 2). The
    spectral norm of that is at most one wherever no weight is negative, by the Schur
    test, and is one if the graph has an edge. A node without any is left at zero.

    Do this once, before the solve. Cost: `3 * m` multiplications for `m` edges, `n**2`
    for `m` if dense. Sums are taken in at least float32.

    **Arguments:**

    - `adjacency`: A square matrix of weights that are not negative, an array or a
        `jax.experimental.sparse.BCOO` without batched or dense axes.
    - `self_weight`: The weight of the edge from each node to itself that is added.

    **Returns:**

    A matrix of the same kind. A sparse one has `n` more entries for the `n` nodes.

    **Raises:**

    - `ValueError`: At trace time, if `adjacency` is not square, not floating point, or
        has batched or dense axes.
    """
    check_adjacency(adjacency)
    size, dtype = adjacency.shape[0], adjacency.dtype
    nodes = jnp.arange(size)
    loop = jnp.broadcast_to(jnp.asarray(self_weight, dtype), (size,))
    if not isinstance(adjacency, sparse.BCOO):
        weights = adjacency.at[nodes, nodes].add(loop).astype(at_least_single(dtype))
        rows, columns = (_inverse_root(weights.sum(axis)) for axis in (1, 0))
        return (rows[:, None] * weights * columns[None]).astype(dtype)
    if adjacency.n_batch or adjacency.n_dense:
        raise ValueError(
            "`adjacency` must have no batched or dense axes; got `n_batch="
            f"{adjacency.n_batch}`, `n_dense={adjacency.n_dense}`."
        )
    nodes = nodes.astype(adjacency.indices.dtype)
    loops = jnp.stack([nodes, nodes], axis=1)
    indices = jnp.concatenate([adjacency.indices, loops])
    weights = jnp.concatenate([adjacency.data, loop]).astype(at_least_single(dtype))
    scaled = weights
    for ends in (indices[:, 0], indices[:, 1]):
        sums = jnp.zeros((size,), weights.dtype)
        # Entries that only fill up the arrays have an index beyond the last.
        roots = _inverse_root(sums.at[ends].add(weights, mode="drop"))
        scaled = scaled * roots.at[ends].get(mode="fill", fill_value=0)
    normalised: Any = sparse.BCOO(
        (scaled.astype(dtype), indices), shape=adjacency.shape
    )
    return normalised


def _inverse_root(sums: Float[Array, " n"]) -> Float[Array, " n"]:
    is_positive = sums > 0
    return jnp.where(is_positive, lax.rsqrt(jnp.where(is_positive, sums, 1)), 0)
