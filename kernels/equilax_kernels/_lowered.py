"""Kernels as one operation: not traced before it is known for which program."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.extend as jex
import jax.tree_util as jtu
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

from ._by_rows import by_rows
from ._mesh import to_vary, varying


Solve: TypeAlias = Callable[..., tuple[Array, ...]]

_call_p: Any = jex.core.Primitive("equilax_kernel")
_call_p.multiple_results = True


@_call_p.def_abstract_eval
def _abstract_eval(*avals, out, treedef, **params):
    del params
    whole = lambda x: NamedSharding(avals[0].sharding.mesh, P(*(None,) * x.ndim))
    like = ft.partial(avals[0].update, weak_type=False)
    found = out(*jtu.tree_unflatten(treedef, avals))
    return [like(shape=x.shape, dtype=x.dtype, sharding=whole(x)) for x in found]


def _is_split(context: Any) -> bool:
    """Whether the compiler divides a program between devices by itself."""
    if hasattr(context, "manual_axes"):
        shape = context.mesh.shape
        return any(shape[axis] > 1 for axis in set(shape) - context.manual_axes)
    return getattr(context, "num_devices", 1) > 1


def _is_able(context: Any, platforms: Sequence[str]) -> bool:
    """Whether a program may hold a kernel."""
    # JAX keeps a program that it exports readable for months, of which it makes no
    # promise for a kernel of Triton's. One of Mosaic's nobody can divide.
    is_exported = context.lowering_parameters.for_export
    if "cuda" in platforms and is_exported:
        return False
    return "tpu" not in platforms or not _is_split(context.axis_context)


def _lower(ctx, *leaves, run, otherwise, treedef, out):
    del out
    # What differs between devices is a matter of types, and those have been checked.
    plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    ctx = ctx.replace(avals_in=plain)
    context = ctx.module_context
    is_able = _is_able(context, ctx.platforms or context.platforms)
    solve = run if is_able else otherwise
    call = lambda *leaves: solve(*jtu.tree_unflatten(treedef, leaves))
    return mlir.lower_fun(call)(ctx, *leaves)


mlir.register_lowering(_call_p, _lower)


@ft.partial(jax.jit, static_argnames=("run", "otherwise", "treedef", "out"))
def _call(*leaves, **params):
    return tuple(_call_p.bind(*leaves, **params))


def when_lowered(
    run: Solve,
    otherwise: Solve,
    args: PyTree[Array],
    is_row: Sequence[bool] | None,
    out: Callable[..., tuple[jax.ShapeDtypeStruct, ...]],
) -> tuple[Array, ...]:
    """Call `run(*args)`, traced no earlier than when the program is lowered.

    A program that may hold no kernel calls `otherwise` instead: one that is exported
    for CUDA, and one that the compiler divides between several TPUs.

    **Arguments:**

    - `run`, `otherwise`: Hashable functions that capture no arrays.
    - `is_row`: For each leaf of `args`, whether rows are along its first axis: each
        device then solves for the rows that it has. `None` leaves that to nobody.
    - `out`: What both return for such `args`, all of it with rows along the first axis.
    """
    leaves, treedef = jtu.tree_flatten(args)
    call = ft.partial(_call, run=run, otherwise=otherwise, treedef=treedef, out=out)
    axes = varying(*leaves)
    if axes:  # Divided by hand.
        return call(*(to_vary(x, axes) for x in leaves))
    if is_row is None:
        return call(*leaves)
    return by_rows(call, is_row, leaves, out(*args))
