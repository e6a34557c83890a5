"""Workloads of `python -m bench` on a GPU, with the contenders that are installed."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax

from .compare import report
from .compare.contender import Contender
from .compare.libraries import all_contenders
from .compare.run import run
from .compare.torch_peer import SOLVERS, TorchPeer
from .compare.workload import Workload
from .compare.workloads import all_workloads


# The first are what a device is most wanted to tell.
_NAMES = ("uniform", "ragged, 2 slow", "transformer", "stiff", "convolutional")
_NAMES += ("ragged, 10%", "ragged, log-normal")
# Each costs a compilation: one of them is the clock of the floor.
_COUNTED = ("equilax, Anderson, own tolerance",)
_LIBRARIES = ("equilax", "by hand", "Optimistix")


def _contenders() -> list[Contender]:
    found = [c for c in all_contenders() if c.library in _LIBRARIES]
    return [c for c in found if c.name != "Broyden"]


def _torch(work: Workload) -> list[TorchPeer]:
    if importlib.util.find_spec("torch") is None:
        return []
    has_all = importlib.util.find_spec("torchdeq") is not None
    solvers = SOLVERS if has_all else ("two loops",)
    return [TorchPeer(work, solver, sys.executable) for solver in solvers]


def _row(name: str, work: Workload, repeats: int) -> dict:
    found = run(
        work,
        _contenders(),
        _torch(work),
        repeats=repeats,
        counted=_COUNTED,
        workers=os.cpu_count() or 1,
    )
    ratios = {
        kind: {k: report.ratio(found, k, kind) for k in report.LIBRARIES}
        for kind in ("both", "forward")
    }
    return {"workload": name, "times as long as equilax": ratios, **found}


def workloads(small: bool) -> Iterator[dict]:
    """A row a workload: all that was found, and the best of each library."""
    made = all_workloads(small)
    # Not the rounded products of a GPU's default, with which no tolerance is reached.
    # In no context: programs are compiled in threads, which would not be in it.
    config: Any = jax.config
    before = config.jax_default_matmul_precision
    config.update("jax_default_matmul_precision", "highest")
    try:
        for name in _NAMES:
            yield _row(name, made[name](), 3 if small else 15)
    finally:
        config.update("jax_default_matmul_precision", before)
