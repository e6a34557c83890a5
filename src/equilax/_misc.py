import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._convolution import with_quick_convolutions
from ._custom_types import AxisName, BoolScalar, Y
from ._dtype import at_least_single
from ._mesh import on_all


def tree_where(pred: BoolScalar, true: PyTree[Array], false: PyTree[Array]):
    """Select whole trees: never by arithmetic, in which zero times NaN is NaN."""
    return jtu.tree_map(ft.partial(jnp.where, pred), true, false)


def tree_allfinite(tree: PyTree[Array], axis_name: AxisName = None) -> BoolScalar:
    """Whether every element of every leaf is finite. An empty tree is finite.

    **Arguments:**

    - `axis_name`: The mesh axes along which the leaves are split.
    """
    finite = jtu.tree_map(lambda x: jnp.all(jnp.isfinite(x)), tree)
    return on_all(jtu.tree_reduce(jnp.logical_and, finite, jnp.array(True)), axis_name)


def difference(y: Y, f: Y) -> Y:
    """`f - y`, in at least single precision."""

    def subtract(a, b):
        dtype = at_least_single(a.dtype)
        return b.astype(dtype) - a.astype(dtype)

    return jtu.tree_map(subtract, y, f)


def per_sample(is_batch: bool) -> Callable[[Callable], Callable]:
    """How a function of one sample is called on what may be a batch of them."""
    return jax.vmap if is_batch else lambda fn: fn


def transposed(linear: Callable, like: PyTree[Array]) -> Callable:
    """The transpose of a linear function of a tree like `like`."""
    transpose = jax.linear_transpose(linear, like)
    return lambda x: transpose(x)[0]


def struct(tree: PyTree[Any]) -> PyTree[Any]:
    """Shapes and dtypes alone: what two trees are compared by.

    Never by sharding or by the mesh axes over which a leaf varies: inside `shard_map`
    these differ between a start that is zero everywhere and the iterates after it.
    """
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


class Hoisted(eqx.Module):
    """A function with everything that it had captured turned into leaves of its own.

    `jax.vmap`, differentiation and loops then see what was a closure. Traces `fn` once,
    when it is built; calls evaluate the trace. As `equinox.filter_closure_convert`, but
    compares nothing when called: that one compares shardings too, which differ between
    a start and its iterates inside `shard_map`.
    """

    consts: list[Array]
    jaxpr: Any = eqx.field(static=True)
    out_struct: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    out_static: Any = eqx.field(static=True)

    def __call__(self, *args):
        call = jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(self.jaxpr, self.consts))
        flat = call(*jtu.tree_leaves(eqx.filter(args, eqx.is_array)))
        out = jtu.tree_unflatten(jtu.tree_structure(self.out_struct), flat)
        return eqx.combine(out, self.out_static)


def hoist(fn: Callable, *args: PyTree[Any]) -> Hoisted:
    """Trace `fn(*args)` once and return it as a [`Hoisted`][] function."""
    dynamic, static = eqx.partition(args, eqx.is_array)
    found = []

    def of_arrays(dynamic):
        out = fn(*eqx.combine(dynamic, static))
        out, out_static = eqx.partition(out, eqx.is_array)
        found.append(out_static)
        return out

    closed, out_struct = jax.make_jaxpr(of_arrays, return_shape=True)(dynamic)
    closed = with_quick_convolutions(closed)
    consts = [jnp.asarray(x) for x in closed.consts]
    return Hoisted(consts, closed.jaxpr, struct(out_struct), found[-1])
