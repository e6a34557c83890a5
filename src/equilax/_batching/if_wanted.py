from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._custom_types import BoolScalar
from .._mesh import all_vary, any_varying
from .lockstep import Lockstep
from .loop import Loop


def if_wanted(
    is_wanted: BoolScalar,
    fn: Callable[[PyTree[Any]], PyTree[Array]],
    operand: PyTree[Any],
    otherwise: PyTree[Array],
) -> PyTree[Array]:
    """`fn(operand)` if it is wanted, and `otherwise` if not.

    As `lax.cond`, but under `jax.vmap` nothing runs unless some sample wants it, where
    `lax.cond` turns into a selection between two results: it is a loop of one pass at
    most, and the loops of the library know when a whole batch has ended.

    **Arguments:**

    - `fn`: Captures no arrays; `operand` holds all of them.
    """
    inputs, static = eqx.partition(operand, eqx.is_array)

    def body(num_passes, now, inputs):
        is_wanted, old = now
        axes = any_varying(now, inputs)
        align = lambda tree: all_vary(tree, axes)
        run = lambda operand, old: align(fn(eqx.combine(operand, static)))
        skip = lambda operand, old: align(old)
        # Always true, which the compiler does not know. It would take what does not
        # change out of a loop, whole loops included, and so run it in any case.
        new = lax.cond(num_passes == 0, run, skip, inputs[1], old)
        # A sample that does not want it is one of a batch in which another does.
        chosen = jtu.tree_map(lambda a, b: jnp.where(is_wanted, a, b), new, old)
        return jnp.zeros_like(is_wanted), chosen

    loop = Loop(lambda inputs: (inputs[0], inputs[2]), body, lambda now: now[0])
    return Lockstep().solve(loop, (is_wanted, inputs, otherwise))[1]
