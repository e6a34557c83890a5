"""Evaluations of a cell in a solve, and transposed products in its backward pass.

Counted where they happen, and so those for samples that have long converged too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .measure import Compiled


_counts: list[int] = []

# Both are the identity. The one is counted where it runs, and the other where it is
# transposed: once for each product with the transposed Jacobian of what follows it.
# `rows` is how many samples an operand stands for: one call tells of them all.
_told = Primitive("told")
_seen = Primitive("seen")


def _tell(z, *, rows):
    def add(_):
        _counts.append(rows)
        return np.zeros((), np.float32)

    nothing = jax.pure_callback(
        add, jax.ShapeDtypeStruct((), np.float32), jnp.real(z.ravel()[0])
    )
    # Unknown to the compiler, which would leave out what makes no difference.
    return z + nothing.astype(z.dtype)


def _transpose(ct, z, *, rows):
    del z
    return [ct if type(ct) is ad.Zero else _told.bind(ct, rows=rows)]


def _differentiate(primals, tangents, *, rows):
    return _told.bind(*primals, rows=rows), tangents[0]


def _define(primitive, lowered):
    def batch(args, axes, *, rows):
        (z,), (axis,) = args, axes
        return primitive.bind(z, rows=rows * z.shape[axis]), axis

    primitive.def_impl(jax.jit(lowered, static_argnames="rows"))
    primitive.def_abstract_eval(lambda z, *, rows: z)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=False))


_define(_told, _tell)
_define(_seen, lambda z, *, rows: z)
ad.primitive_jvps[_told] = _differentiate
ad.deflinear2(_seen, _transpose)


def _mark(primitive, z: Any) -> Any:
    """The state, whose first leaf is counted when it passes."""
    leaves, structure = jax.tree.flatten(z)
    return structure.unflatten([primitive.bind(leaves[0], rows=1), *leaves[1:]])


def _run(compiled: Compiled, tolerances, cell, is_forward: bool) -> float:
    work = compiled.workload

    def whole(zs, args):
        params, xs = args
        return jax.vmap(lambda z, x: cell(z, (params, x)))(zs, xs)

    def forward(params, xs):
        return compiled.solve(cell, whole, tolerances, params, xs)

    loss = lambda params, xs: work.loss(forward(params, xs), params)
    fn = forward if is_forward else jax.grad(loss, (0, 1))
    _counts.clear()
    jax.block_until_ready(jax.jit(fn)(*compiled.arrays))
    return sum(_counts) / work.num_samples


def evaluations(compiled: Compiled, tolerances) -> float:
    """Of the cell in a forward solve, for each sample."""
    counted = lambda z, args: compiled.workload.cell(_mark(_told, z), args)
    return _run(compiled, tolerances, counted, is_forward=True)


def products(compiled: Compiled, tolerances) -> float:
    """With the transposed Jacobian in a backward pass, for each sample."""
    counted = lambda z, args: compiled.workload.cell(_mark(_seen, z), args)
    return _run(compiled, tolerances, counted, is_forward=False)
