from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from .._custom_types import IntScalar
from .._mesh import all_vary, any_varying
from .layout import Layout, put, take
from .loop import Carry, Inputs, Loop, while_loop


def _run_stage(
    loop: Loop,
    layout: Layout,
    leaves: list[Array],
    treedef: Any,
    start: tuple[IntScalar, Carry],
    next_size: int,
) -> tuple[IntScalar, Carry]:
    """Run the batch until no more than `next_size` samples (of a group) are live."""

    def body(num_steps, carry, leaves):
        return loop.body(num_steps, carry, jtu.tree_unflatten(treedef, leaves))

    step = layout.lift(body)

    def one_pass(carry):
        num_steps, now = carry
        return num_steps + 1, step(num_steps, now, leaves)

    def too_many(carry):
        is_live = layout.per_sample(loop.is_live)(carry[1])
        num_live = jnp.sum(is_live, axis=-1, dtype=jnp.int32)
        return jnp.any(num_live > next_size)

    return while_loop(too_many, one_pass, start, may_vary=any_varying(leaves))


def _run_chain(
    loop: Loop,
    layout: Layout,
    leaves: list[Array],
    treedef: Any,
    sizes: tuple[int, ...],
) -> Carry:
    """Run the stages one after the other, each on the samples that the last left."""

    def init(leaves):
        return loop.init(jtu.tree_unflatten(treedef, leaves))

    start = (jnp.zeros((), jnp.int32), layout.lift_init(init)(leaves))
    first, *rest = (*sizes[1:], 0)
    num_steps, final = _run_stage(loop, layout, leaves, treedef, start, first)
    if not rest:
        return final
    axes = any_varying(final, leaves)

    def align(carry):
        return all_vary(carry, axes)

    def go_on(final):
        return align(
            _run_rest(loop, layout, leaves, treedef, sizes[1:], num_steps, final)
        )

    is_live = layout.per_sample(loop.is_live)(final)
    return lax.cond(jnp.any(is_live), go_on, align, final)


def _run_rest(
    loop: Loop,
    layout: Layout,
    leaves: list[Array],
    treedef: Any,
    sizes: tuple[int, ...],
    num_steps: IntScalar,
    final: Carry,
) -> Carry:
    """The stages after the first, which left the samples in `final`."""
    carry, order = final, None
    for size, next_size in zip(sizes, (*sizes[1:], 0), strict=True):
        is_done = jnp.logical_not(layout.per_sample(loop.is_live)(carry))
        chosen = jnp.argsort(is_done, axis=-1, stable=True)[..., :size]
        layout, carry, leaves = layout.gather(carry, leaves, chosen)
        order = chosen if order is None else layout.per_group(take)(order, chosen)
        num_steps, carry = _run_stage(
            loop, layout, leaves, treedef, (num_steps, carry), next_size
        )
        final = layout.per_group(put)(final, order, carry)
    return final


def solve_batch(
    loop: Loop, inputs: Inputs, sizes: Callable[[int], tuple[int, ...]]
) -> Carry:
    """Run `loop`, such that `jax.vmap`s of this call, however nested, run one batch.

    **Arguments:**

    - `loop`, `inputs`: As for [`equilax.AbstractBatching`][].
    - `sizes`: Maps the number of samples to the static sizes of the stages.
    """
    leaves, treedef = jtu.tree_flatten(inputs)
    carry_struct = jax.eval_shape(loop.init, inputs)
    carry_size = sum(x.size for x in jtu.tree_leaves(carry_struct))

    def custom(run_plain, run_outer):
        run = custom_vmap(run_plain)

        @run.def_vmap
        def _(num, is_batched, *leaves):
            if num == 1:  # A batch of one costs what a lone problem costs.
                first = [
                    x[0] if b else x for x, b in zip(leaves, is_batched, strict=True)
                ]
                out = jtu.tree_map(lambda x: x[None], run(*first))
            else:
                out = run_outer(num, list(is_batched), list(leaves))
            return out, jtu.tree_map(lambda _: True, out)

        return run

    def of_layout(layout):
        def run_plain(*leaves):
            return _run_chain(loop, layout, list(leaves), treedef, sizes(layout.size))

        def run_outer(num, is_batched, leaves):
            new_layout, leaves = layout.extend(num, is_batched, leaves, carry_size)
            out = of_layout(new_layout)(*leaves)
            lead = (num, layout.size)
            if layout.num_groups is not None:
                lead = (num, layout.num_groups, layout.size)
            old = 1 if new_layout.num_groups is None else 2
            return jtu.tree_map(lambda x: x.reshape(*lead, *x.shape[old:]), out)

        return custom(run_plain, run_outer)

    def run_plain(*leaves):
        return loop.run(jtu.tree_unflatten(treedef, leaves), is_alone=True)

    def run_outer(num, is_batched, leaves):
        none = (False,) * len(leaves)
        return of_layout(Layout(num, None, tuple(is_batched), none))(*leaves)

    return custom(run_plain, run_outer)(*leaves)
