"""The table, the figure and the files at the end of the multiscale example."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
from figures import (
    BLUE,
    GREY,
    new_figure,
    ORANGE,
    running_mean,
    save_figure,
    tidy,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from multiscale_measure import gradient_error
from multiscale_model import assess, TOLERANCE
from tables import num_parameters, or_none, two_columns
from training import Run


_NUM_LAST = 20  # Steps of training, of which the backward solves are.
_NUM_CHECKED = 8  # Held-out images that the gradient is checked on.
_NUM_TRACES = 64
_NUM_DIGITS = 5
_NUM_CHANNELS = 4


def finish(
    run: Run,
    config: dict[str, Any],
    held_out: list[np.ndarray],
    *,
    batch_size: int,
    out: Path,
) -> None:
    """Measure the model, print the table, write the parameters, metrics, figure."""
    model, history = run.model, run.history
    aux = jax.device_get(assess(model, *map(jnp.asarray, held_out)))
    parameters = checkpoint.serialise(model)
    few = [x[:_NUM_CHECKED] for x in (*held_out, *aux["z"])]
    error = gradient_error(model, few[0], few[1], tuple(few[2:]), batch_size=batch_size)
    last = {k: v[-_NUM_LAST:] for k, v in history.items()}
    assessed = np.sum(np.isfinite(history["accuracy"]))
    metrics = {
        "parameters": num_parameters(model),
        "num_correct": int(np.sum(aux["is_correct"])),
        "num_held_out": len(aux["is_correct"]),
        "accuracy": float(np.mean(aux["is_correct"])),
        "forward_steps_mean": float(np.mean(aux["steps"])),
        "forward_steps_worst": int(np.max(aux["steps"])),
        "backward_steps_mean": float(np.mean(last["backward"])),
        "backward_steps_worst": int(np.max(last["backward_worst"])),
        "solves": batch_size * run.step + int(assessed) * len(aux["is_correct"]),
        "backward_solves": batch_size * run.step,
        "failed_forward": int(np.sum(history["forward_failed"]))
        + int(np.nansum(history["failed"])),
        "failed_backward": int(np.sum(history["backward_failed"])),
        "gradient_error": or_none(error),
        "jacobian": float(np.mean(last["jacobian"])),
        "seconds": run.seconds,
        "sha256": hashlib.sha256(parameters).hexdigest(),
        "config": config,
        "history": {k: [or_none(x) for x in v] for k, v in history.items()},
    }
    checkpoint.replace_file(out / "final.eqx", parameters)
    text = json.dumps(metrics, indent=1)
    checkpoint.replace_file(out / "metrics.json", text.encode())
    figure = _figure(metrics, history, aux, held_out[0])
    save_figure(out / "multiscale.png", figure, dpi=105)
    print(f"\n{_table(metrics)}\n")
    print(f"sha256 of the parameters  {metrics['sha256']}")
    print(f"In {out}: final.eqx, metrics.json, multiscale.png")


def _table(m: dict[str, Any]) -> str:
    right = f"{m['num_correct']} of {m['num_held_out']} images"
    error, when = m["gradient_error"], f"  (last {_NUM_LAST} batches of training)"
    rows = {
        "parameters": f"{m['parameters']:,}",
        "held-out accuracy": f"{m['accuracy']:.2%}  ({right})",
        "forward steps, mean": f"{m['forward_steps_mean']:.2f}",
        "forward steps, worst": f"{m['forward_steps_worst']}",
        "backward steps, mean": f"{m['backward_steps_mean']:.2f}{when}",
        "backward steps, worst": f"{m['backward_steps_worst']}{when}",
        "failed forward solves": f"{m['failed_forward']}"
        f"  (of {m['solves']:,} in the whole run)",
        "failed backward solves": f"{m['failed_backward']}"
        f"  (of {m['backward_solves']:,})",
        "error of the gradient": ("unknown" if error is None else f"{error:.1e}")
        + f"  ({_NUM_CHECKED} images, all parameters; against dense float64)",
        "size of the Jacobian": f"{m['jacobian']:.3f}"
        "  (mean square of the singular values)",
        "seconds": f"{m['seconds']:.0f}",
    }
    return two_columns(rows)


def _figure(metrics, history, aux, images) -> Figure:
    figure, axes = new_figure(2, 3)
    _training_panels(axes[0], history)
    _trace_panel(axes[1, 0], aux["trace"][:_NUM_TRACES])
    for ax in (*axes[0], axes[1, 0]):
        tidy(ax)
    for ax in axes[1, 1:]:
        ax.remove()
    grid = axes[1, 0].get_gridspec()
    _state_panel(figure.add_subplot(grid[1, 1:]), images, aux["z"])
    failed = metrics["failed_forward"] + metrics["failed_backward"]
    figure.suptitle(
        f"Multiscale equilibrium on digits: {metrics['accuracy']:.1%} held-out "
        f"accuracy, {metrics['forward_steps_mean']:.1f} steps per solve, "
        f"{failed} failed solves",
        fontsize=14,
    )
    return figure


def _training_panels(axes: np.ndarray, history: dict[str, np.ndarray]) -> None:
    loss, accuracy, steps = axes
    numbers = np.arange(1, len(history["loss"]) + 1)
    is_assessed = np.isfinite(history["accuracy"])
    marker = "o" if np.sum(is_assessed) < 5 else ""
    pairs = (
        (loss, "loss", "held_out_loss", 1),
        (
            accuracy,
            "train_accuracy",
            "accuracy",
            100,
        ),
    )
    for ax, train, test, scale in pairs:
        values = scale * running_mean(history[train])
        ax.plot(numbers, values, color=GREY, label="training (augmented), mean of 20")
        values = scale * history[test][is_assessed]
        ax.plot(
            numbers[is_assessed], values, color=BLUE, label="held out", marker=marker
        )
    loss.set(title="Loss", ylabel="cross-entropy", yscale="log")
    accuracy.set(title="Accuracy", ylabel="per cent", ylim=(80, 100.5))
    for name, colour in (("forward", BLUE), ("backward", ORANGE)):
        steps.plot(numbers, running_mean(history[name]), color=colour, label=name)
        worst = history[f"{name}_worst"]
        steps.plot(numbers, worst, color=colour, lw=0.6, alpha=0.4)
    steps.set(
        title="Steps per solve in training, mean and worst", ylabel="steps", ylim=0
    )
    for ax in axes:
        ax.set(xlabel="step of training", xlim=(1, len(numbers)))


def _trace_panel(ax: Axes, traces: np.ndarray) -> None:
    lines = ax.semilogy(traces.T, color=BLUE, lw=0.6, alpha=0.5)
    lines[0].set_label(f"{len(traces)} images")
    ax.axhspan(
        TOLERANCE, 2 * TOLERANCE, color=ORANGE, alpha=0.35, lw=0, label="tolerance"
    )
    ax.set(
        title="Residual of the forward solve",
        xlabel="step",
        ylabel="largest element of $|f(z) - z|$",
        xlim=0,
    )


def _state_panel(ax: Axes, images: np.ndarray, z: tuple[np.ndarray, ...]) -> None:
    """Some digits, and some channels of their states, as tiles of one image."""
    columns, titles = [images[:_NUM_DIGITS].reshape(-1, 8, 8)], ["image"]
    for scale in z:
        size = scale.shape[-1]
        titles.append(f"{size} by {size}")
        for channel in range(_NUM_CHANNELS):
            shown = scale[:_NUM_DIGITS, channel]
            columns.append(np.kron(shown, np.ones((8 // size, 8 // size))))
    mosaic = np.full((9 * _NUM_DIGITS - 1, 9 * len(columns) - 1 + 3 * len(z)), np.nan)
    starts = []
    for i, tiles in enumerate(columns):
        left = 9 * i + 3 * math.ceil(i / _NUM_CHANNELS)
        low, high = np.min(tiles), np.max(tiles)
        for j, tile in enumerate(tiles):
            shade = (tile - low) / max(high - low, 1e-12)
            mosaic[9 * j : 9 * j + 8, left : left + 8] = shade
        starts.append(left)
    # None as white as the page.
    ax.imshow(mosaic, cmap="gray", vmax=1.15, interpolation="nearest")
    ax.set_axis_off()
    middles = [3.5, *(starts[1 + _NUM_CHANNELS * i] + 17 for i in range(len(z)))]
    for x, title in zip(middles, titles, strict=True):
        ax.text(x, -2, title, ha="center", va="bottom")
    ax.set_title(
        f"The equilibrium of {_NUM_DIGITS} held-out digits, {_NUM_CHANNELS} channels "
        "of each resolution",
        pad=24,
    )
