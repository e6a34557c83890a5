"""All contenders on one workload."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from . import count, floor
from .contender import Contender
from .measure import Compiled, Entry, fit, KINDS, time_in_turns
from .progress import progress
from .workload import Workload


Cases = dict[tuple[str, str], Callable[[], Any]]


class Outsider(Protocol):
    """A contender that JAX does not run."""

    row: str
    version: str

    def fit(self) -> Entry: ...

    def cases(self, entry: Entry) -> dict[str, Callable[[], Any]]: ...

    def close(self) -> None: ...


def _kinds(entry: Entry, work: Workload) -> tuple[str, ...]:
    if entry.gradient_error is None:
        return KINDS[:1]
    return KINDS if work.update is not None else KINDS[:2]


def _inside(
    work: Workload,
    contenders: Sequence[Contender],
    entries: dict[str, Entry],
    *,
    counted: Sequence[str] | None,
) -> Cases:
    """**Arguments:**

    - `counted`: The libraries of which the evaluations are counted, if not all.
    """
    cases: Cases = {}
    all_compiled = [Compiled(contender, work) for contender in contenders]
    for compiled in progress(all_compiled, work.name):
        contender = compiled.contender
        entry = entries[contender.row] = fit(compiled)
        if (tolerances := entry.tolerances) is None:
            continue
        kinds = _kinds(entry, work)
        for kind in kinds:
            cases[contender.row, kind] = compiled(kind, tolerances)
        if counted is None or contender.library in counted:
            entry.evaluations = count.evaluations(compiled, tolerances)
            if contender.library == "equilax" and "both" in kinds:
                entry.products = count.products(compiled, tolerances)
        if "both" in kinds:
            entry.compile_seconds = compiled.seconds["both"]
            entry.memory = compiled.memory("both", tolerances)
        if "step" in kinds:
            entry.step_memory = compiled.memory("step", tolerances)
    return cases


def _floors(work: Workload, entries: dict[str, Entry]) -> tuple[Cases, dict[str, Any]]:
    """Of the least work that one of ours does."""
    ours = [e for e in entries.values() if e.library == "equilax"]
    pairs = [(e.evaluations, e.products) for e in ours if e.evaluations]
    if not pairs:
        return {}, {}
    least = min(evaluations for evaluations, _ in pairs)
    cases: Cases = {("floor", "forward"): floor.forward(work, least)}
    found: dict[str, Any] = {"evaluations": least, **floor.cost(work)}
    sums = [(a, b) for a, b in pairs if b is not None]
    if sums:
        pair = min(sums, key=sum)
        cases["floor", "both"] = floor.both(work, *pair)
        found["evaluations and products"] = list(pair)
    return cases, found


def run(
    work: Workload,
    contenders: Sequence[Contender],
    outsiders: Sequence[Outsider] = (),
    *,
    repeats: int,
    counted: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What the report and the regression guard read: in JSON's types."""
    if work.is_single:  # The whole of it is the sample.
        contenders = [c for c in contenders if not c.is_whole]
    entries: dict[str, Entry] = {}
    with work.precision():
        cases = _inside(work, contenders, entries, counted=counted)
        for other in outsiders:
            entry = entries[other.row] = other.fit()
            for kind, case in other.cases(entry).items():
                cases[other.row, kind] = case
        floors, found = _floors(work, entries)
        times = time_in_turns(cases | floors, repeats=repeats, title=work.name)
    for other in outsiders:
        other.close()
    for (row, kind), value in times.items():
        if row == "floor":
            found[kind] = value
        else:
            setattr(entries[row], kind, value)
    return {
        "what": work.what,
        "target": work.target,
        "floor": found,
        "torch": next((o.version for o in outsiders if o.version), ""),
        "rows": {row: dataclasses.asdict(entry) for row, entry in entries.items()},
    }
