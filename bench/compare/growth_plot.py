"""Small multiples of growth: a row a measure, a column what is varied."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .growth import LIBRARIES


_COLOURS: dict[str, str] = dict(
    zip(LIBRARIES, ("#c1272d", "#222222", "#d9772b", "#1f5fa8"), strict=True)
)
_MARKERS: dict[str, str] = dict(zip(LIBRARIES, "osD^", strict=True))
_MEASURES = {
    "forward": ("solution, ms", 1.0),
    "both": ("with gradient, ms", 1.0),
    "memory": ("memory, MiB", 2.0**-20),
    "compile": ("compilation, s", 1.0),
}


def plot(path: Path, points: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(point["axis"] for point in points))
    figure = Figure(figsize=(2.9 * len(columns) + 0.6, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(_MEASURES), len(columns), sharex="col", sharey="row", squeeze=False
    )
    for row, (measure, (label, scale)) in zip(panels, _MEASURES.items(), strict=True):
        for ax, column in zip(row, columns, strict=True):
            here = [point for point in points if point["axis"] == column]
            for library in LIBRARIES:
                _line(ax, here, library, measure, scale)
            ax.set(xscale="log", yscale="log")
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(label)
    for ax, column in zip(panels[-1], columns, strict=True):
        ax.set_xlabel(column)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(LIBRARIES), frameon=False
    )
    figure.savefig(path, dpi=72, pil_kwargs={"optimize": True})


def _line(ax: Any, points: list[dict[str, Any]], library: str, measure: str, scale):
    pairs = [(p["x"], p["libraries"][library][measure]) for p in points]
    pairs = [(x, y * scale) for x, y in pairs if y]  # Nothing has no logarithm.
    if pairs:
        x, y = zip(*pairs, strict=True)
        style = {"color": _COLOURS[library], "marker": _MARKERS[library], "ms": 4.5}
        ax.plot(x, y, lw=1.4, label=library, **style)
