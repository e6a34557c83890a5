"""How time, memory and compilation grow with samples, unknowns and steps.

One tanh cell, of which one of the three is varied: the best contender of ours and of
three others at each point, at an equal true error. Of each a method or two, for all of
them take minutes a point to compile.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from .contender import Contender
from .libraries import all_contenders
from .report import best
from .run import run
from .workload import Workload
from .workloads import tanh


_METHODS = {
    "equilax": ("alternating, own tolerance", "iteration, own tolerance"),
    "by hand": ("two loops",),
    "JAXopt": ("iteration, GMRES",),
    "Optimistix": ("GMRES",),
}
LIBRARIES = tuple(_METHODS)
# Reached in single precision at all gains.
_TARGET = 1e-3


@dataclasses.dataclass(frozen=True)
class Axis:
    """What is varied, and its values; the rest is as in `_BASE`."""

    name: str
    label: str
    values: tuple[float, ...]


_BASE: dict[str, Any] = {"gain": 0.9, "size": 64, "batch": 16}
_AXES = (
    Axis("batch", "samples", (1, 16, 256, 4096)),
    Axis("size", "unknowns", (16, 64, 256, 1024)),
    Axis("gain", "1 / (1 - gain), as the steps", (0.5, 0.9, 0.99, 0.999)),
)
_SMALL = (
    Axis("batch", "samples", (1, 8)),
    Axis("gain", "1 / (1 - gain), as the steps", (0.5, 0.9)),
)


def _workload(axis: Axis, value: float, small: bool) -> Workload:
    base = {**_BASE, **({"size": 8, "batch": 2} if small else {}), axis.name: value}
    return tanh(**base, target=_TARGET, max_steps=30_000)


def _contenders(libraries: list[str] | None) -> list[Contender]:
    found = [c for c in all_contenders() if c.name in _METHODS.get(c.library, ())]
    return [c for c in found if libraries is None or c.library in libraries]


def _point(found: dict[str, Any]) -> dict[str, Any]:
    """Of each library the best row: forward, and with the gradient."""
    point = {}
    for library in LIBRARIES:
        forward, both = (best(found, library, kind) for kind in ("forward", "both"))
        point[library] = {
            "forward": None if forward is None else forward["forward"],
            "both": None if both is None else both["both"],
            "memory": None if both is None else both["memory"],
            "compile": None if both is None else both["compile_seconds"],
            "row": None if both is None else both["name"],
        }
    return point


def measure(
    *, small: bool, repeats: int, libraries: list[str] | None
) -> Iterator[dict[str, Any]]:
    """A point at a time."""
    for axis in _SMALL if small else _AXES:
        for value in axis.values:
            work = _workload(axis, value, small)
            found = run(work, _contenders(libraries), repeats=repeats, counted=())
            x = 1 / (1 - value) if axis.name == "gain" else value
            head = {"axis": axis.label, "x": round(x, 6), "what": work.what}
            yield {**head, "libraries": _point(found)}


def table(points: list[dict[str, Any]]) -> str:
    """Milliseconds with the gradient, forward in brackets; MiB; seconds to compile."""
    lines = [["", "", *LIBRARIES], ["---"] * (2 + len(LIBRARIES))]
    for point in points:
        cells = [_cell(point["libraries"][library]) for library in LIBRARIES]
        lines.append([point["axis"], f"{point['x']:g}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(entry: dict[str, Any]) -> str:
    if entry["both"] is None:
        return "-"
    time = f"{entry['both']:.2f} ({entry['forward']:.2f}) ms"
    return f"{time}, {entry['memory'] / 2**20:.2f} MiB, {entry['compile']:.1f} s"
