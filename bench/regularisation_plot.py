"""The figure of the benchmark of regularisation."""

import io
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image


_COLOURS = ("#8a8f98", "#d9772b", "#1f5fa8", "#3a8f5c")
_PANELS = {
    "forward": ("Steps of a forward solve in training", "mean over an epoch", 1),
    "backward": ("Steps of a backward solve in training", "mean over an epoch", 1),
    "accuracy": ("Held-out accuracy", "per cent", 100),
    "radius": ("Spectral radius of the Jacobian", "largest of 64 held-out images", 1),
}


def plot(
    path: Path, found: dict[float, list[dict[str, np.ndarray]]], *, title: str
) -> None:
    """Draw means over the seeds, and bands from the least to the largest.

    **Arguments:**

    - `found`: By weight of the penalty and seed, the history.
    """
    first = next(iter(found.values()))
    num_epochs = len(first[0]["loss"])
    epochs = np.arange(1, num_epochs + 1)
    figure = Figure(figsize=(9.5, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)
    for ax, (name, (panel, label, scale)) in zip(
        axes.flat, _PANELS.items(), strict=True
    ):
        for i, (weight, runs) in enumerate(found.items()):
            values = scale * np.stack([history[name] for history in runs])
            colour = _COLOURS[i % len(_COLOURS)]
            legend = f"penalty times {weight:g}" if weight else "no penalty"
            ax.plot(epochs, np.mean(values, axis=0), color=colour, label=legend)
            low, high = np.min(values, axis=0), np.max(values, axis=0)
            ax.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
        ax.set(title=panel, ylabel=label, xlim=(1, num_epochs))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if name == "accuracy":
            ax.set_ylim(bottom=85)
        else:
            ax.set_ylim(bottom=0)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(f"{title}: means and ranges of {len(first)} seeds")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    # With a palette it takes a third of the space.
    image = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, "png", optimize=True)
