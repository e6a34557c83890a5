"""The table, the figure and the files at the end of the digits example."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
from digits_measure import (
    assess,
    gradient_error,
    NUM_LOOKED_AT,
    spectral_radius,
    traces,
)
from digits_model import Classifier, LARGEST_NORM, TOLERANCE
from figures import (
    BLUE as _FORWARD,
    GREY as _OTHER,
    new_figure,
    ORANGE as _BACKWARD,
    save_figure,
    tidy,
)
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tables import or_none, two_columns


def finish(
    model: Classifier,
    history: dict[str, np.ndarray],
    counts: dict[str, int],
    held_out: list[np.ndarray],
    batch: tuple[np.ndarray, np.ndarray],
    config: dict[str, Any],
    *,
    started: float,
    out: Path,
) -> None:
    """Measure the model, print the table, write `final.eqx`, the metrics, the figure.

    **Arguments:**

    - `batch`: What the gradient is checked on, of the size that training had.
    - `started`: When the run did, on the monotonic clock.
    """
    aux = {k: np.asarray(v) for k, v in assess(model, *held_out).items()}
    residuals = traces(model, held_out[0][:NUM_LOOKED_AT])
    parameters = checkpoint.serialise(model)
    metrics = {
        "accuracy": float(np.mean(aux["is_correct"])),
        "num_correct": int(np.sum(aux["is_correct"])),
        "num_held_out": aux["is_correct"].size,
        "forward_steps_mean": float(np.mean(aux["forward_steps"])),
        "forward_steps_worst": int(np.max(aux["forward_steps"])),
        "backward_steps_mean": float(np.mean(aux["backward_steps"])),
        "backward_steps_worst": int(np.max(aux["backward_steps"])),
        **counts,
        "gradient_error": gradient_error(model, *batch),
        "spectral_radius": spectral_radius(model, aux["z"][:NUM_LOOKED_AT]),
        "seconds": time.monotonic() - started,
        "sha256": hashlib.sha256(parameters).hexdigest(),
        "config": config,
        "history": {k: [or_none(x) for x in v] for k, v in history.items()},
    }
    checkpoint.replace_file(out / "final.eqx", parameters)
    text = json.dumps(metrics, indent=1)
    checkpoint.replace_file(out / "metrics.json", text.encode())
    save_figure(out / "digits.png", _figure(history, aux, residuals, metrics))
    print(f"\n{_table(metrics)}\n")
    print(f"sha256 of the parameters  {metrics['sha256']}")
    print(f"In {out}: final.eqx, metrics.json, digits.png")


def _table(m: dict[str, Any]) -> str:
    solves = f"of {m['solves']:,}"
    right = f"{m['num_correct']} of {m['num_held_out']} images"
    rows = {
        "held-out accuracy": f"{m['accuracy']:.2%}  ({right})",
        "forward steps, mean": f"{m['forward_steps_mean']:.2f}",
        "forward steps, worst": f"{m['forward_steps_worst']}"
        f"  ({m['worst_forward']} in the whole run)",
        "backward steps, mean": f"{m['backward_steps_mean']:.2f}",
        "backward steps, worst": f"{m['backward_steps_worst']}",
        "failed forward solves": f"{m['failed_forward']}  ({solves} in the whole run)",
        "failed backward solves": f"{m['failed_backward']}  ({solves})",
        "error of the gradient": f"{m['gradient_error']:.1e}"
        "  (relative, all parameters; against dense float64)",
        "spectral radius, worst": f"{m['spectral_radius']:.3f}"
        f"  (of {NUM_LOOKED_AT} held-out images)",
        "seconds": f"{m['seconds']:.0f}",
    }
    return two_columns(rows)


def _figure(history, aux, residuals, metrics) -> Figure:
    figure, axes = new_figure(2, 3)
    _training_panels(axes[0], history)
    _solve_panels(axes[1], history, aux, residuals)
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        tidy(ax)
    for ax in (*axes[0], axes[1, 2]):
        ax.set(xlabel="epoch", xlim=(0, len(history["loss"]) - 1))
        for line in ax.get_lines():  # A line of few points, or of one.
            line.set_marker("o" if len(history["loss"]) < 10 else "")
            line.set_clip_on(False)
    figure.suptitle(
        f"Equilibrium classifier on digits: {metrics['accuracy']:.1%} held-out "
        f"accuracy, {metrics['forward_steps_mean']:.1f} steps per solve, "
        f"{metrics['failed_forward'] + metrics['failed_backward']} failed solves",
        fontsize=14,
    )
    return figure


def _training_panels(axes: np.ndarray, history: dict[str, np.ndarray]) -> None:
    loss, accuracy, radius = axes
    epochs = np.arange(len(history["loss"]))
    for name, label, colour in (
        ("train_", "training (augmented)", _OTHER),
        ("", "held out", _FORWARD),
    ):
        loss.semilogy(epochs, history[f"{name}loss"], color=colour, label=label)
        share = 100 * history[f"{name}accuracy"]
        accuracy.plot(epochs[1:], share[1:], color=colour, label=label)
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    loss.set(title="Loss", ylabel="cross-entropy")
    accuracy.set(title="Accuracy", ylabel="per cent")
    radius.axhspan(
        LARGEST_NORM,
        1.2,
        color=_OTHER,
        alpha=0.2,
        lw=0,
        label="ruled out by the norm of the weight",
    )
    radius.plot(epochs, history["spectral_radius"], color=_FORWARD, label="measured")
    radius.set(
        title="Spectral radius of the Jacobian",
        ylabel=f"largest of {NUM_LOOKED_AT} held-out images",
        ylim=(0, 1.2),
    )


def _solve_panels(axes: np.ndarray, history, aux, residuals) -> None:
    trace, histogram, steps = axes
    colours = {"plain iteration": _OTHER, "Anderson": _FORWARD}
    for name, batch in residuals.items():
        lines = trace.semilogy(batch.T, color=colours[name], lw=0.6, alpha=0.5)
        lines[0].set_label(f"{name}, {len(batch)} images")
    trace.axhspan(
        TOLERANCE, 2 * TOLERANCE, color=_BACKWARD, alpha=0.35, lw=0, label="tolerance"
    )
    longest = max(np.max(np.sum(np.isfinite(x), axis=1)) for x in residuals.values())
    trace.set(
        title="Residual of the forward solve",
        xlabel="step",
        ylabel="largest element of $|f(z) - z|$",
        xlim=(0, longest),
    )
    kinds = {"forward": _FORWARD, "backward": _BACKWARD}
    values = [aux[f"{kind}_steps"] for kind in kinds]
    bins = np.arange(np.min(values), np.max(values) + 2) - 0.5
    histogram.hist(values, bins, color=[*kinds.values()], label=[*kinds], rwidth=0.8)
    for kind, colour in kinds.items():
        mean = history[f"{kind}_steps"]
        steps.plot(np.arange(len(mean)), mean, color=colour, label=kind)
    histogram.set(
        title=f"Steps per solve, {len(values[0])} held-out images",
        xlabel="steps",
        ylabel="images",
    )
    steps.set(title="Mean steps per solve, held-out images", ylabel="steps")
    steps.set_ylim(bottom=0)
