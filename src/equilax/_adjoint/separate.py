"""Take out of a function all that does not depend on its iterate.

Inside `jax.shard_map` parameters that are the same on all devices are cast to differ
between them where they meet an iterate that does, and the transpose of that cast is a
sum over the devices. In a loop of which each device takes its own number of steps there
must be none: here the cast goes before the loop, and so the sum after it.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._mesh import any_varying, vary_over, varying


def _variables(variables) -> list[Any]:
    return [v for v in variables if isinstance(v, jex.core.Var)]


def _function(jaxpr, invars, outvars, eqns) -> Callable[..., list[Array]]:
    """The function of `invars` that some of the equations of `jaxpr` make."""
    part = jex.core.Jaxpr((), invars, outvars, eqns, jaxpr.effects, jaxpr.debug_info)
    return jex.core.jaxpr_as_fun(jex.core.ClosedJaxpr(part, ()))


def _inlined(closed, *args: Array) -> list[Array]:
    """Evaluate `closed`, such that a trace of this has no `jit` inside."""
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))

    def read(var):
        return var.val if isinstance(var, jex.core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit":
            out = _inlined(eqn.params["jaxpr"], *map(read, eqn.invars))
        else:
            variables = list(dict.fromkeys(_variables(eqn.invars)))
            fn = _function(jaxpr, variables, eqn.outvars, [eqn])
            out = fn(*map(read, variables))
        env.update(zip(eqn.outvars, out, strict=True))
    return list(map(read, jaxpr.outvars))


def _sub_jaxprs(eqn) -> list[Any]:
    leaves = jtu.tree_leaves(
        list(eqn.params.values()),
        is_leaf=lambda x: isinstance(x, (jex.core.Jaxpr, jex.core.ClosedJaxpr)),
    )
    closed = [x.jaxpr for x in leaves if isinstance(x, jex.core.ClosedJaxpr)]
    return closed + [x for x in leaves if isinstance(x, jex.core.Jaxpr)]


def _casts(jaxpr) -> bool:
    """Whether a cast is hidden in there."""
    return any(
        eqn.primitive.name == "pvary" or any(map(_casts, _sub_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _check(eqns, shared: set[Any]):
    """Refuse a cast of a `shared` variable that cannot be taken out."""
    for eqn in eqns:
        is_shared = any(v in shared for v in eqn.invars if isinstance(v, jex.core.Var))
        if is_shared and any(map(_casts, _sub_jaxprs(eqn))):
            raise ValueError(
                "`adjoint=ReversibleAdjoint()` inside `jax.shard_map` needs parameters "
                f"that differ between devices in the `{eqn.primitive.name}` that `fn` "
                "holds: cast them before the solve, `jax.lax.pcast(params, axis_names, "
                'to="varying")`, or take `equilax.ImplicitAdjoint`.'
            )


class _Parts(eqx.Module):
    # Equations before the loop and in it, and the variables that lead from those to
    # these: first the ones that depend on what is differentiated.
    before: Sequence[Any]
    inside: Sequence[Any]
    moving: Sequence[Any]
    fixed: Sequence[Any]


def _divide(jaxpr, num_y: int, num_moving: int, axes: frozenset[str]) -> _Parts:
    needed, eqns = set(_variables(jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if needed & set(eqn.outvars) or eqn.effects:
            needed |= set(_variables(eqn.invars))
            eqns.insert(0, eqn)
    unknown = set(jaxpr.invars[:num_y])
    moves = set(jaxpr.invars[num_y : num_y + num_moving])
    before, inside = [], []
    for eqn in eqns:
        variables = set(_variables(eqn.invars))
        if variables & moves:
            moves |= {
                v for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)
            }
        if variables & unknown or eqn.effects:
            unknown |= set(eqn.outvars)
            inside.append(eqn)
        else:
            before.append(eqn)
    used = [v for eqn in inside for v in _variables(eqn.invars)]
    used = dict.fromkeys(used + _variables(jaxpr.outvars))
    crossing = [v for v in used if v not in unknown]
    moving = [v for v in crossing if v in moves]
    fixed = [v for v in crossing if v not in moves]
    _check(inside, {v for v in moving if not axes <= v.aval.mat.varying})
    return _Parts(before, inside, moving, fixed)


def separate(
    fn: Callable[[PyTree[Array], PyTree[Any]], PyTree[Array]],
    y: PyTree[Array],
    params: tuple[PyTree[Any], PyTree[Any]],
) -> tuple[Callable, tuple[PyTree[Any], PyTree[Any]], Callable]:
    """Prepare `fn`, which maps `(y, params)` to a tree like `y`, for a loop.

    **Arguments:**

    - `params`: A pair of trees, of which the first is differentiated.

    **Returns:**

    A function and parameters to put in the place of `fn` and `params`, and the function
    that takes the cotangent of the first of them to that of the first of `params`.
    """
    axes = any_varying(y)
    if all(axes <= varying(x) for x in jtu.tree_leaves(params[0])):
        return fn, params, lambda ct: ct
    dynamic, static = eqx.partition(params, eqx.is_array)
    leaves, treedef = jtu.tree_flatten((y, dynamic))
    num_y, num_moving = len(jtu.tree_leaves(y)), len(jtu.tree_leaves(dynamic[0]))

    def flat(*leaves):
        y, dynamic = jtu.tree_unflatten(treedef, leaves)
        out = jtu.tree_leaves(fn(y, eqx.combine(dynamic, static)))
        like = zip(out, jtu.tree_leaves(y), strict=True)
        return [vary_over(f, varying(x)) for f, x in like]

    closed = jax.make_jaxpr(flat)(*leaves)
    closed = jax.make_jaxpr(ft.partial(_inlined, closed))(*leaves)
    jaxpr, invars = closed.jaxpr, closed.jaxpr.invars
    parts = _divide(jaxpr, num_y, num_moving, axes)
    crossing = [*parts.moving, *parts.fixed]
    known = [*jaxpr.constvars, *invars[num_y:]]
    before = _function(jaxpr, known, crossing, parts.before)
    inside = _function(jaxpr, [*invars[:num_y], *crossing], jaxpr.outvars, parts.inside)

    def of_moving(moving):
        values = [*jtu.tree_leaves(moving), *leaves[num_y + num_moving :]]
        out = before(*closed.consts, *values)
        return out[: len(parts.moving)], out[len(parts.moving) :]

    def of_y(y, params):
        out = inside(*jtu.tree_leaves(y), *params[0], *params[1])
        return jtu.tree_unflatten(jtu.tree_structure(y), out)

    moving, pull, fixed = jax.vjp(of_moving, dynamic[0], has_aux=True)
    return of_y, (moving, fixed), lambda ct: pull(ct)[0]
