"""The scientific problems of `tests/problems.py` as workloads.

One sample each, as it comes: a vector, complex numbers, or a tree of several dtypes. In
double precision, and with the gradient in all that `fn` takes, if it takes anything.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tests import problems

from .workload import DOUBLE, Workload


_TARGET = 1e-8
# What differs in name, or has none, in `torch_cells.py`.
_TORCH = {"mixed_tree": "", "complex": "complex_exponential"}
_LINEAR = ("linear", "expanding", "non_normal", "poisson", "pagerank")
_FEW = ("cosine", "mixed_tree", "complex")


def _cotangent(rng, y) -> np.ndarray:
    ct = rng.normal(size=np.shape(y))
    return ct + 1j * rng.normal(size=np.shape(y)) if np.iscomplexobj(y) else ct


def _torch_cell(name: str) -> str:
    if name.startswith(_LINEAR):
        return "linear"
    return _TORCH.get(name, "tanh" if name.startswith("tanh") else name)


def _describe(y0: Any) -> str:
    kinds = [f"{y.dtype}{list(y.shape)}" for y in jax.tree.leaves(y0)]
    return f"a state of {' and '.join(kinds)}"


def _workload(name: str) -> Workload:
    with jax.enable_x64(True):
        problem = problems.make(name)
    cell = lambda y, args: problem.fn(y, args[0])
    rng = np.random.default_rng(0)
    return Workload(
        f"problem: {name}",
        f"{name.replace('_', ' ')}, {_describe(problem.y0)}",
        cell,
        params=problem.args,
        xs=(),
        cts=jax.tree.map(ft.partial(_cotangent, rng), problem.y0),
        # What is in part single precision cannot be as good as what is in double.
        target=max(_TARGET, 100 * problem.rounding),
        max_steps=30_000,
        is_single=True,
        start=problem.y0,
        solutions=problem.expected,
        torch_cell=_torch_cell(name),
        dtype=None,
        tolerances=DOUBLE,
    )


def all_problems(small: bool) -> dict[str, Callable[[], Workload]]:
    """By name, and made when they are wanted; a few if `small`."""
    names = _FEW if small else problems.NAMES
    return {f"problem: {name}": ft.partial(_workload, name) for name in names}
