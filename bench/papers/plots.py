"""Figures in one look."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


COLOURS = ("#1f5fa8", "#d9772b", "#3a8f5c", "#8a8f98", "#a3437a", "#6b5bb5")


def panels(titles: Sequence[str], *, share: bool = True) -> tuple[Figure, list]:
    """A figure with a panel for each title, all logarithmic upwards."""
    figure = Figure(figsize=(4.2 * len(titles), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, len(titles), sharey=share, squeeze=False).flat)
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, yscale="log")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
