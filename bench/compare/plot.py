"""How many times as long as ours the others take, a panel a kind."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from .report import LIBRARIES, ratio, Results


_COLOURS = (
    *("#222222", "#8a8f98", "#1f5fa8", "#d9772b", "#3f8f5b", "#b04a7d"),
    *("#7a5cab", "#c1272d", "#b59410"),
)
_MARKERS = "sxo^vDPX*"


def plot(path: Path, results: Results) -> None:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    workloads = list(results["workloads"])
    for ax, kind, title in zip(
        panels, ("both", "forward"), ("Solution and gradient", "Solution"), strict=True
    ):
        for library, colour, marker in zip(LIBRARIES, _COLOURS, _MARKERS, strict=True):
            found = [ratio(results["workloads"][w], library, kind) for w in workloads]
            x = np.array([np.nan if r is None else r for r in found])
            if np.all(np.isnan(x)):
                continue
            rows = np.arange(len(workloads))
            ax.plot(x, rows, marker, color=colour, label=library, ms=7, alpha=0.85)
        ax.axvline(1, color="#222222", lw=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(
            FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000])
        )
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(title=title, xlabel="times as long as equilax, at equal true error")
        ax.grid(axis="both", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(workloads)), workloads)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[1].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(LIBRARIES),
        frameon=False,
    )
    figure.savefig(path, dpi=110)
