"""What `vmap` and derivatives do to a solve of many rows."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap


def fold_batches(
    run: Callable[..., Any], run_each: Callable[..., Any]
) -> Callable[..., Any]:
    """`run`, whose rows more rows join under `vmap`, nested or not.

    **Arguments:**

    - `run`: Maps `(weight, u, z0, scale, knobs)` to a tuple of arrays along the rows.
    - `run_each`: Maps the same with a leading axis to results with one, for a batch of
        weights or of tolerances, which rows cannot share.
    """

    @custom_vmap
    def folded(weight, u, z0, scale, knobs):
        return run(weight, u, z0, scale, knobs)

    @folded.def_vmap
    def _rule(size, is_batched, weight, u, z0, scale, knobs):
        def spread(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

        arrays = (weight, u, z0, scale, knobs)
        is_shared = not any(jtu.tree_leaves((is_batched[0], is_batched[4])))
        if not is_shared:
            out = run_each(*jtu.tree_map(spread, arrays, tuple(is_batched)))
        else:
            rows = jtu.tree_map(spread, arrays[1:4], tuple(is_batched[1:4]))
            fold = lambda x: x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
            out = folded(weight, *jtu.tree_map(fold, rows), knobs)
            out = tuple(x.reshape(size, -1, *x.shape[1:]) for x in out)
        return out, (True,) * len(out)

    return folded


def without_derivative(run: Callable[..., Any], message: str) -> Callable[..., Any]:
    """`run`, which says so when it is differentiated."""

    @jax.custom_jvp
    def opaque(*arrays):
        return run(*arrays)

    @opaque.defjvp
    def _jvp(primals, tangents):
        del primals, tangents
        raise TypeError(message)

    return opaque
