"""The figure of the gradient benchmark."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter


# By what an adjoint does: one colour each, and a marker each within it.
_COLOURS = {
    "solved": "#1f5fa8",
    "truncated": "#d9772b",
    "shared": "#3a8f5c",
    "unrolled": "#8a8f98",
}
_MARKERS = "osD^v<>"


def _group(name: str) -> str:
    if name.startswith("Neumann"):
        return "truncated"
    if name.startswith("shared"):
        return "shared"
    if name.startswith(("checkpointed", "reversible")):
        return "unrolled"
    return "solved"


def _styles(names: list[str]) -> dict[str, dict]:
    styles, counts = {}, dict.fromkeys(_COLOURS, 0)
    for name in names:
        group = _group(name)
        marker = _MARKERS[counts[group] % len(_MARKERS)]
        styles[name] = {"color": _COLOURS[group], "marker": marker}
        counts[group] += 1
    return styles


def plot(
    path: Path, points: dict[float, dict[str, tuple[float, float]]], *, subtitle: str
) -> None:
    """Draw the error of a gradient against the time of both of its passes.

    **Arguments:**

    - `points`: By gain and adjoint, milliseconds and relative error. One that failed
        has no error, and no marker.
    """
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    styles = _styles(list(next(iter(points.values()))))
    for ax, (gain, entries) in zip(axes.flat, points.items(), strict=True):
        for name, (time, error) in entries.items():
            ax.plot(time, error, linestyle="", markersize=8, **styles[name])
        ax.set(xscale="log", yscale="log", title=f"gain {gain}")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("milliseconds, forward and backward")
        # Of one decade and a half: powers of ten alone would be two ticks.
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error of dW, float32")
    handles = [
        axes[0, 0].plot([], [], linestyle="", label=name, **style)[0]
        for name, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle("What a gradient costs, and how wrong it is")
    figure.text(0.01, -0.02, subtitle, fontsize=7, color="#5f6368")
    figure.savefig(path, dpi=100, bbox_inches="tight")
