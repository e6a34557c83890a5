from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Int, PyTree

from .loop import Carry


class Layout(eqx.Module):
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
    ) -> tuple["Layout", Carry, list[Array]]:
        """The samples `order` alone. Inputs that they share are left in place."""
        carry = self.per_group(take)(carry, order)
        new_leaves, has_group = [], []
        for leaf, is_sampled, is_grouped in zip(
            leaves, self.has_sample, self.has_group, strict=True
        ):
            if is_sampled and self.num_groups is not None:
                lift = jax.vmap(take, in_axes=(0 if is_grouped else None, 0))
                leaf, is_grouped = lift(leaf, order), True
            elif is_sampled:
                leaf = take(leaf, order)
            new_leaves.append(leaf)
            has_group.append(is_grouped)
        layout = Layout(
            order.shape[-1], self.num_groups, self.has_sample, tuple(has_group)
        )
        return layout, carry, new_leaves

    def extend(
        self, num: int, is_outer: list[bool], leaves: list[Array], carry_size: int
    ) -> tuple["Layout", list[Array]]:
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
            return Layout(self.size, groups, self.has_sample, has_group), merged
        if any(size > carry_size for size in copied):
            return Layout(self.size, num, self.has_sample, tuple(is_outer)), leaves
        merged = [
            _merge(leaf, o, s, num, self.size)
            for leaf, o, s in zip(leaves, is_outer, self.has_sample, strict=True)
        ]
        has_sample = _either(is_outer, self.has_sample)
        return Layout(num * self.size, None, has_sample, self.has_group), merged


def _axes(has_axis: tuple[bool, ...]) -> list[int | None]:
    return [0 if has else None for has in has_axis]


def _either(a, b) -> tuple[bool, ...]:
    return tuple(x or y for x, y in zip(a, b, strict=True))


def take(tree: PyTree[ArrayLike], order: Int[Array, " size"]) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x[order], tree)


def put(into: Carry, order: Int[Array, " size"], tree: Carry):
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
