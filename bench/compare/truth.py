"""Solutions and adjoints of a workload in float64, with nothing of the library in them.

Newton's method with dense Jacobians where the state is small, the plain iteration
forward and backward where it is large.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree


Tree = Any


def solutions(work: Any, args: tuple[Tree, Tree]) -> Tree:
    starts = work.starts(np.float64)
    if not work.is_dense:
        return _iterate(lambda zs: work.whole(zs, args), starts, 20_000)
    zs = lax.fori_loop(0, 100, lambda _, zs: work.whole(zs, args), starts)
    for _ in range(8):  # Newton's.
        residuals, systems = _rows(work, args, zs)
        steps = jnp.linalg.solve(systems, residuals[..., None])[..., 0]
        zs = jax.tree.map(jnp.add, zs, _trees(work, zs, steps))
    assert jnp.max(jnp.abs(_rows(work, args, zs)[0])) < 1e-13
    return zs


def adjoints(work: Any, args: tuple[Tree, Tree], zs: Tree, cts: Tree) -> Tree:
    """The `u` for which `u = J^T u + ct`, in the convention of `jax.vjp`."""
    if not work.is_dense:
        _, transposed = jax.vjp(lambda zs: work.whole(zs, args), zs)
        return _iterate(
            lambda u: jax.tree.map(jnp.add, transposed(u)[0], cts),
            jax.tree.map(jnp.zeros_like, cts),
            20_000,
        )
    _, systems = _rows(work, args, zs)
    # JAX's cotangent of a complex number is the conjugate of the pair of derivatives.
    rows = jax.vmap(lambda ct: _real(ct)[0])(_batch(work, jax.tree.map(jnp.conj, cts)))
    us = jnp.linalg.solve(jnp.swapaxes(systems, 1, 2), rows[..., None])[..., 0]
    return jax.tree.map(jnp.conj, _trees(work, zs, us))


def _batch(work: Any, tree: Tree) -> Tree:
    """With an axis of samples, if it is one without."""
    return jax.tree.map(lambda x: x[None], tree) if work.is_single else tree


def _real(tree: Tree):
    """A tree as a real vector, and how to make a tree of such a one."""
    parts = jax.tree.map(lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else x, tree)
    flat, unravel = ravel_pytree(parts)
    join = lambda like, x: lax.complex(*x) if jnp.iscomplexobj(like) else x
    return flat, lambda flat: jax.tree.map(join, tree, unravel(flat))


def _trees(work: Any, like: Tree, rows: jax.Array) -> Tree:
    one = jax.tree.map(lambda x: x[0], _batch(work, like))
    trees = jax.vmap(_real(one)[1])(rows)
    return jax.tree.map(lambda x: x[0], trees) if work.is_single else trees


def _rows(work: Any, args: tuple[Tree, Tree], zs: Tree):
    """The residual and the dense `I - J` of each sample."""
    params, xs = args

    def one(z, x):
        flat, unravel = _real(z)
        fn = lambda flat: _real(work.cell(unravel(flat), (params, x)))[0]
        return fn(flat) - flat, jnp.eye(flat.size) - jax.jacfwd(fn)(flat)

    return jax.vmap(one)(_batch(work, zs), _batch(work, xs))


def _iterate(fn, y, most: int):
    """Until a step moves nothing any more but the last digits."""

    def is_moving(carry):
        y, last, count = carry
        return (count < most) & (jnp.max(jnp.abs(y - last)) > 1e-14)

    step = lambda carry: (fn(carry[0]), carry[0], carry[2] + 1)
    y, last, _ = lax.while_loop(is_moving, step, (fn(y), y, 0))
    assert jnp.max(jnp.abs(y - last)) < 1e-11, "The plain iteration has not settled."
    return y
