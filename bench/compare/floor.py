"""The floor: the evaluations and products that a solve needs, and nothing else.

With their operations and bytes, as XLA counts them in one evaluation of the batch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .workload import Workload


def _evaluate(work: Workload, number: int, args):
    step = lambda _, zs: work.whole(zs, args)
    return lax.fori_loop(0, number, step, work.starts())


def forward(work: Workload, evaluations: float) -> Callable[[], Any]:
    """As many evaluations in a row."""
    number, args = math.ceil(evaluations), work.arrays()
    run = jax.jit(lambda args: _evaluate(work, number, args))
    return lambda: run(args)


def both(work: Workload, evaluations: float, products: float) -> Callable[[], Any]:
    """These, then as many products with the transposed Jacobian in a row."""
    numbers, args = (math.ceil(evaluations), math.ceil(products)), work.arrays()

    @jax.jit
    def run(args):
        zs = _evaluate(work, numbers[0], args)
        cts = jax.tree.map(lambda z, ct: jnp.asarray(ct, z.dtype), zs, work.cts)
        _, transposed = jax.vjp(lambda zs: work.whole(zs, args), zs)
        step = lambda _, us: jax.tree.map(jnp.add, transposed(us)[0], cts)
        return lax.fori_loop(0, numbers[1], step, cts)

    return lambda: run(args)


def cost(work: Workload) -> dict[str, float]:
    """Of one evaluation of the batch. Bytes: what each fused operation moves."""
    made = jax.jit(work.whole).lower(work.starts(), work.arrays()).compile()
    found: Any = made.cost_analysis()
    found = found[0] if isinstance(found, list) else found or {}
    get = lambda name: float(found.get(name, math.nan))
    return {"operations": get("flops"), "bytes": get("bytes accessed")}
