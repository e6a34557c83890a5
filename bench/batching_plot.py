"""The figure of the batching benchmark."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


_COLOURS = {"plain": "#8a8f98", "Lockstep": "#d9772b"}
_LABELS = {"plain": "jax.vmap of a plain while_loop", "Lockstep": "Lockstep()"}


def plot(
    path: Path, rows: dict[int, dict[str, float]], *, num: int, subtitle: str
) -> None:
    """Draw milliseconds against the number of slow samples in a batch of `num`.

    **Arguments:**

    - `rows`: By number of slow samples, the milliseconds of each strategy.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    counts = list(rows)
    for name in next(iter(rows.values())):
        ax.plot(
            counts,
            [rows[n][name] for n in counts],
            marker="o",
            color=_COLOURS.get(name, "#1f5fa8"),
            label=_LABELS.get(name, name),
        )
    # Zero has a place beside one.
    ax.set_xscale("symlog", base=2, linthresh=1, linscale=0.7)
    ax.set_yscale("log")
    ax.set_xticks(counts, [str(n) for n in counts])
    ax.minorticks_off()
    ax.set(xlabel=f"slow samples in a batch of {num}", ylabel="milliseconds a solve")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    ax.set_title("A slow sample holds up no quick one")
    figure.text(0.01, -0.02, subtitle, fontsize=7, color="#5f6368")
    figure.savefig(path, dpi=150, bbox_inches="tight")
