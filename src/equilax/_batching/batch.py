from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, ArrayLike, Int, PyTree

from .._custom_types import IntScalar
from .._misc import any_varying, vary_over
from .loop import Carry, Inputs, Loop, while_loop


class _Layout(eqx.Module):
    """Which leading axes each input has: `[num_groups,] [size,] ...`.

    Samples are gathered along the sample axis. Nested `vmap`s fold into it where that
    copies little. Where an outer `vmap` is over something large that the samples share,
    as in an ensemble of models, it becomes the group axis: each group has its own order
    of samples, all groups move to the next stage together.
    """

    size: int = eqx.field(static=True)
    num_groups: int | None = eqx.field(static=True)
    has_sample: tuple[bool, ...] = eqx.field(static=True)
    has_group: tuple[bool, ...] = eqx.field(static=True)

    def lift(self, fn: Callable) -> Callable:
        """Lift `fn(num_steps, carry, leaves)` from one problem to the batch."""
        fn = jax.vmap(fn, in_axes=(None, 0, _axes(self.has_sample)))
        if self.num_groups is not None:
            fn = jax.vmap(fn, in_axes=(None, 0, _axes(self.has_group)))
        return fn

    def lift_init(self, fn: Callable) -> Callable:
        """Lift `fn(leaves)` likewise."""
        fn = jax.vmap(fn, in_axes=(_axes(self.has_sample),))
        if self.num_groups is not None:
            fn = jax.vmap(fn, in_axes=(_axes(self.has_group),))
        return fn

    def per_sample(self, fn: Callable) -> Callable:
        """Lift `fn(carry)` likewise."""
        return self.per_group(jax.vmap(fn))

    def per_group(self, fn: Callable) -> Callable:
        return fn if self.num_groups is None else jax.vmap(fn)

    def gather(
        self, carry: Carry, leaves: list[Array], order: Int[Array, "..."]
    ) -> tuple["_Layout", Carry, list[Array]]:
        """The samples `order` alone. Inputs that they share are left in place."""
        carry = self.per_group(_take)(carry, order)
        new_leaves, has_group = [], []
        for leaf, is_sampled, is_grouped in zip(
            leaves, self.has_sample, self.has_group, strict=True
        ):
            if is_sampled and self.num_groups is not None:
                take = jax.vmap(_take, in_axes=(0 if is_grouped else None, 0))
                leaf, is_grouped = take(leaf, order), True
            elif is_sampled:
                leaf = _take(leaf, order)
            new_leaves.append(leaf)
            has_group.append(is_grouped)
        layout = _Layout(
            order.shape[-1], self.num_groups, self.has_sample, tuple(has_group)
        )
        return layout, carry, new_leaves

    def extend(
        self, num: int, is_outer: list[bool], leaves: list[Array], carry_size: int
    ) -> tuple["_Layout", list[Array]]:
        """The layout and leaves under one more `vmap`, over `num`, outside this one."""
        copied = [
            leaf.size // max(num, 1)
            for leaf, o, s in zip(leaves, is_outer, self.has_sample, strict=True)
            if o and not s
        ]
        if self.num_groups is not None:
            merged = [
                _merge(leaf, o, g, num, self.num_groups)
                for leaf, o, g in zip(leaves, is_outer, self.has_group, strict=True)
            ]
            has_group = _either(is_outer, self.has_group)
            groups = num * self.num_groups
            return _Layout(self.size, groups, self.has_sample, has_group), merged
        if any(size > carry_size for size in copied):
            return _Layout(self.size, num, self.has_sample, tuple(is_outer)), leaves
        merged = [
            _merge(leaf, o, s, num, self.size)
            for leaf, o, s in zip(leaves, is_outer, self.has_sample, strict=True)
        ]
        has_sample = _either(is_outer, self.has_sample)
        return _Layout(num * self.size, None, has_sample, self.has_group), merged


def _axes(has_axis: tuple[bool, ...]) -> list[int | None]:
    return [0 if has else None for has in has_axis]


def _either(a, b) -> tuple[bool, ...]:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def _take(tree: PyTree[ArrayLike], order: Int[Array, " size"]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[order], tree)


def _put(into: Carry, order: Int[Array, " size"], tree: Carry):
    return jtu.tree_map(lambda x, y: x.at[order].set(y), into, tree)


def _merge(leaf: Array, is_outer: bool, is_inner: bool, outer: int, inner: int):
    """Fold two leading axes, either of which may be absent, into one."""
    if not (is_outer or is_inner):
        return leaf
    if not is_inner:
        leaf = leaf[:, None]
    if not is_outer:
        leaf = leaf[None]
    shape = leaf.shape[2:]
    leaf = jnp.broadcast_to(leaf, (outer, inner, *shape))
    return leaf.reshape(outer * inner, *shape)


def _run_stage(
    loop: Loop,
    layout: _Layout,
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
    layout: _Layout,
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
        return jtu.tree_map(lambda x: vary_over(x, axes), carry)

    def go_on(final):
        return align(
            _run_rest(loop, layout, leaves, treedef, sizes[1:], num_steps, final)
        )

    is_live = layout.per_sample(loop.is_live)(final)
    return lax.cond(jnp.any(is_live), go_on, align, final)


def _run_rest(
    loop: Loop,
    layout: _Layout,
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
        order = chosen if order is None else layout.per_group(_take)(order, chosen)
        num_steps, carry = _run_stage(
            loop, layout, leaves, treedef, (num_steps, carry), next_size
        )
        final = layout.per_group(_put)(final, order, carry)
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
        return loop.run(jtu.tree_unflatten(treedef, leaves))

    def run_outer(num, is_batched, leaves):
        none = (False,) * len(leaves)
        return of_layout(_Layout(num, None, tuple(is_batched), none))(*leaves)

    return custom(run_plain, run_outer)(*leaves)
