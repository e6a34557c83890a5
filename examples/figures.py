"""How the examples' figures look, and how they get into a file."""

import io
from pathlib import Path

import numpy as np
from checkpoint import replace_file
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


BLUE, ORANGE, GREY, GREEN = "#1f5fa8", "#d9772b", "#8a8f98", "#3f8f5b"


def new_figure(
    num_rows: int, num_columns: int, *, width: float = 4.5, height: float = 3.75
) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, an array of two axes. Sizes are of a panel, in inches.

    It knows nothing of a display, and nothing of other figures.
    """
    size = (width * num_columns, height * num_rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def tidy(ax: Axes, *, legend: bool = True) -> None:
    """A light grid, no frame, a legend whose lines can be seen."""
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        for line in ax.legend(frameon=False, fontsize=9).get_lines():
            line.set(linewidth=2, alpha=1)


def running_mean(x: np.ndarray, width: int = 20) -> np.ndarray:
    """The mean of the last `width` values, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], x]))
    ends = np.arange(1, len(x) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def save_figure(path: Path, figure: Figure, *, dpi: int = 120) -> None:
    """As a PNG with a palette, which takes a third of the space and looks the same."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    image = Image.open(drawn).convert("RGB").quantize(dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True)
    replace_file(path, small.getvalue())
