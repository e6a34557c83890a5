from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, ArrayLike, PyTree

from .._custom_types import BoolScalar, IntScalar
from .._mesh import any_varying, vary_over, varying
from .._misc import hoist, Hoisted
from .packing import packing


Carry = PyTree[ArrayLike]
Inputs = PyTree[Array]


class Loop(eqx.Module):
    """A loop over one problem, in pure functions of its arrays.

    `init` maps the inputs to the carry, `body` maps `(num_steps, carry, inputs)` to the
    next carry, `is_live` says of a carry whether it wants another pass. A pass over a
    carry that is not live must return it unchanged: in a batch that is how a finished
    sample stays as it is. `num_steps` counts the passes, and is the same number for all
    the samples of a batch that are live.
    """

    init: Callable[[Inputs], Carry] = eqx.field(static=True)
    body: Callable[[IntScalar, Carry, Inputs], Carry] = eqx.field(static=True)
    is_live: Callable[[Carry], Any] = eqx.field(static=True)

    def run(self, inputs: Inputs, *, is_alone: bool) -> Carry:
        """The loop for one problem.

        **Arguments:**

        - `is_alone`: Whether no `jax.vmap` can make a batch of it.
        """
        axes = any_varying(inputs)
        init = (jnp.zeros((), jnp.int32), self.init(inputs))
        pack = unpack = lambda carry: carry
        # Scalars that vary over a mesh and those that don't cannot be one array.
        if is_alone and not axes:
            pack, unpack = packing(init)

        def cond(carry):
            return self.is_live(unpack(carry)[1])

        def body(carry):
            num_steps, carry = unpack(carry)
            return pack((num_steps + 1, self.body(num_steps, carry, inputs)))

        return unpack(while_loop(cond, body, pack(init), may_vary=axes))[1]


def _traced(fn: Callable, carry: Carry) -> tuple[Hoisted, list[frozenset[str]]]:
    """`fn`, traced for a carry of these types, and the axes of what it returns."""
    found = []

    def probe(carry):
        out = fn(carry)
        found.append([varying(x) for x in jtu.tree_leaves(out)])
        return out

    return hoist(probe, carry), found[-1]


def aligned(
    cond: Callable[[Carry], BoolScalar],
    body: Callable[[Carry], Carry],
    init: Carry,
    *,
    may_vary: frozenset[str],
) -> tuple[Callable[[Carry], BoolScalar], Callable[[Carry], Carry], Carry]:
    """A loop, its carry declared to vary over the mesh axes that it does.

    With `check_vma=True` the types of the carry must agree before and after `body`. JAX
    (to 0.12) lets one mistake through: with a predicate that varies over an axis, a
    carry that does not (a step counter, say) keeps the type "replicated" although the
    devices stop at different steps. So each leaf takes on the predicate's axes as well.
    """
    if not may_vary:
        return cond, body, init
    leaves, treedef = jtu.tree_flatten(init)
    axes = [varying(x) for x in leaves]

    def cast(tree, axes):
        pairs = zip(jtu.tree_leaves(tree), axes, strict=True)
        leaves = [vary_over(x, a) for x, a in pairs]
        return jtu.tree_unflatten(treedef, leaves)

    # Traced once for each guess of the types: loops within loops would otherwise be
    # traced as many times as their depth is to the power of.
    while True:
        carry = cast(init, axes)
        again, (pred,) = _traced(cond, carry)
        step, out = _traced(body, carry)
        new_axes = [a | b | pred for a, b in zip(axes, out, strict=True)]
        if new_axes == axes:
            break
        axes = new_axes
    return lambda c: again(c), lambda c: cast(step(c), axes), carry


def while_loop(
    cond: Callable[[Carry], BoolScalar],
    body: Callable[[Carry], Carry],
    init: Carry,
    *,
    may_vary: frozenset[str],
) -> Carry:
    """`lax.while_loop`, [`aligned`][]."""
    return lax.while_loop(*aligned(cond, body, init, may_vary=may_vary))
