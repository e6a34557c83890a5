"""All contenders on one workload."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from tqdm import tqdm

from .libraries import all_contenders
from .measure import Compiled, count_evaluations, Entry, fit, time_in_turns
from .outside import SciPy, TorchDEQ
from .workload import Workload


_SCIPY = ("anderson", "broyden1", "newton_krylov")
_TORCH = ("anderson", "broyden", "fixed_point_iter")


def _floor(workload: Workload, evaluations: float) -> Callable[[], Any]:
    """As many evaluations in a row, and nothing else."""
    args = workload.arrays()
    number = math.ceil(evaluations)

    @jax.jit
    def run(args):
        step = lambda _, zs: workload.whole(zs, args)
        return lax.fori_loop(0, number, step, workload.starts(args[1]))

    return lambda: run(args)


def _inside(workload: Workload, entries: dict[str, Entry]) -> dict:
    cases = {}
    for contender in tqdm(all_contenders(), desc=workload.name, leave=False):
        compiled = Compiled(contender, workload)
        entry = fit(compiled)
        entries[contender.row] = entry
        if entry.tolerances is None:
            continue
        cases[contender.row, "forward"] = compiled("forward", entry.tolerances)
        entry.evaluations = count_evaluations(compiled, entry.tolerances)
        if not contender.reason:
            cases[contender.row, "both"] = compiled("both", entry.tolerances)
            entry.compile_seconds = compiled.seconds
            entry.memory = compiled.memory(entry.tolerances)
    return cases


def _outside(workload: Workload, entries: dict[str, Entry], others) -> dict:
    cases = {}
    for other in others:
        entry = other.fit()
        entries[other.row] = entry
        if (tolerances := entry.tolerances) is None:
            continue
        if isinstance(other, SciPy):
            cases[other.row, "forward"] = lambda o=other, t=tolerances: o.forward(t[0])
            continue
        for what in ("forward", "both"):
            ask = lambda o=other, w=what, t=tolerances: o.ask(w, *t)
            cases[other.row, what] = ask
    return cases


def run(workload: Workload, *, repeats: int, torch: str | None) -> dict[str, Any]:
    """What the report and the regression guard read: in JSON's types."""
    entries: dict[str, Entry] = {}
    cases = _inside(workload, entries)
    peers = [TorchDEQ(workload, solver, torch) for solver in _TORCH if torch]
    others = [*(SciPy(workload, method) for method in _SCIPY), *peers]
    cases |= _outside(workload, entries, others)
    ours = [e for e in entries.values() if e.library == "equilax" and e.evaluations]
    least = min((e.evaluations for e in ours if e.evaluations), default=0.0)
    cases["floor", "forward"] = _floor(workload, least)
    times = time_in_turns(cases, repeats=repeats, title=workload.name)
    for peer in peers:
        peer.close()
    floor = times.pop(("floor", "forward"))
    for (row, kind), value in times.items():
        setattr(entries[row], kind, value)
    return {
        "what": workload.what,
        "target": workload.target,
        "floor": floor,
        "floor_evaluations": least,
        "torch": peers[0].version if peers else "",
        "rows": {row: dataclasses.asdict(entry) for row, entry in entries.items()},
    }
