"""All contenders on one workload."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..progress import progress
from ..timing import compare
from . import count, floor
from .contender import Contender
from .measure import Compiled, Entry, fit, KINDS
from .workload import Workload


_MOST_SECONDS = 90.0  # For the rounds of one workload.

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


def _compile(all_compiled: list[Compiled], workers: int) -> None:
    """At once what is no new program at each tolerance."""

    def make(job: tuple[Compiled, str]) -> None:
        compiled, kind = job
        coarsest = compiled.workload.tolerances[0]
        # What fails here fails again where it is recorded. A thread is in no context.
        with compiled.workload.precision(), contextlib.suppress(Exception):
            compiled(kind, (coarsest, coarsest))

    kinds = KINDS[:2]
    jobs = [(c, k) for c in all_compiled if not c.contender.is_static for k in kinds]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(make, jobs))


def _inside(
    work: Workload,
    contenders: Sequence[Contender],
    entries: dict[str, Entry],
    *,
    counted: Sequence[str] | None,
    workers: int,
) -> Cases:
    cases: Cases = {}
    all_compiled = [Compiled(contender, work) for contender in contenders]
    if workers > 1:
        _compile(all_compiled, workers)
    for compiled in progress(all_compiled, work.name):
        contender = compiled.contender
        entry = entries[contender.row] = fit(compiled)
        if (tolerances := entry.tolerances) is None:
            continue
        kinds = _kinds(entry, work)
        for kind in kinds:
            cases[contender.row, kind] = compiled(kind, tolerances)
        if counted is None or contender.row in counted:
            entry.evaluations = count.evaluations(compiled, tolerances)
        if counted is None and contender.library == "equilax" and "both" in kinds:
            entry.products = count.products(compiled, tolerances)
        if "both" in kinds:
            if workers == 1:  # Or others were compiled beside it.
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
    workers: int = 1,
) -> dict[str, Any]:
    """**Arguments:**

    - `counted`: The rows whose evaluations are counted. All, and the products of ours,
        if `None`.
    - `workers`: In how many threads to compile. The time of that is measured where it
        is one.

    **Returns:**

    What the report and the regression guard read: in JSON's types.
    """
    if work.is_single:  # The whole of it is the sample.
        contenders = [c for c in contenders if not c.is_whole]
    entries: dict[str, Entry] = {}
    with work.precision():
        cases = _inside(work, contenders, entries, counted=counted, workers=workers)
        for other in outsiders:
            entry = entries[other.row] = other.fit()
            for kind, case in other.cases(entry).items():
                cases[other.row, kind] = case
        floors, found = _floors(work, entries)
        times = compare(
            cases | floors,
            repeats=repeats,
            title=work.name,
            most_seconds=_MOST_SECONDS,
        )
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
