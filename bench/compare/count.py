"""Evaluations of a cell in a solve, and transposed products in its backward pass.

Counted where they happen, and so those for samples that have long converged too.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .measure import Compiled


# The identity, of which is told when it is transposed: once for each product with the
# transposed Jacobian of what follows it. `rows` is how many samples it stands for.
_seen = Primitive("seen")
_counts: list[int] = []


def _transpose(ct, z, *, rows):
    del z
    if type(ct) is not ad.Zero:
        jax.debug.callback(lambda _: _counts.append(rows), ct.ravel()[0])
    return [ct]


def _batch(args, axes, *, rows):
    (z,), (axis,) = args, axes
    return _seen.bind(z, rows=rows * z.shape[axis]), axis


_seen.def_impl(lambda z, *, rows: z)
_seen.def_abstract_eval(lambda z, *, rows: z)
ad.deflinear2(_seen, _transpose)
batching.primitive_batchers[_seen] = _batch
mlir.register_lowering(
    _seen, mlir.lower_fun(lambda z, *, rows: z, multiple_results=False)
)


def _first(z: Any) -> Any:
    """A number of the state, which is there for each sample."""
    return jax.tree.leaves(z)[0].ravel()[0]


def _observe(z: Any) -> Any:
    """The state, whose first leaf is counted when a product passes it."""
    leaves, structure = jax.tree.flatten(z)
    return structure.unflatten([_seen.bind(leaves[0], rows=1), *leaves[1:]])


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
    jax.effects_barrier()
    return sum(_counts) / work.num_samples


def evaluations(compiled: Compiled, tolerances) -> float:
    """Of the cell in a forward solve, for each sample."""

    def counted(z, args):
        jax.debug.callback(lambda _: _counts.append(1), _first(z))
        return compiled.workload.cell(z, args)

    return _run(compiled, tolerances, counted, is_forward=True)


def products(compiled: Compiled, tolerances) -> float:
    """With the transposed Jacobian in a backward pass, for each sample."""
    counted = lambda z, args: compiled.workload.cell(_observe(z), args)
    return _run(compiled, tolerances, counted, is_forward=False)
