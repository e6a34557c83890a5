"""The figure of the language example."""

from pathlib import Path
from typing import Any

import numpy as np
from figures import (
    BLUE,
    GREEN,
    GREY,
    new_figure,
    ORANGE,
    running_mean,
    save_figure,
    tidy,
)
from language_model import TOLERANCE
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from training import Run


_COLOURS = {"equilibrium": BLUE, "baseline": ORANGE, "longer": GREY}


def draw(
    path: Path,
    runs: dict[str, Run],
    looks: dict[str, dict[str, np.ndarray]],
    by_steps: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    figure, axes = new_figure(2, 3)
    (loss, place, stopped), (steps, residual, radius) = axes
    _losses(loss, {k: runs[k] for k in ("equilibrium", "baseline")})
    _places(place, looks)
    _stopped(stopped, residual, by_steps, metrics)
    _solves(steps, radius, runs["equilibrium"])
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        tidy(ax)
    texts = [f"{name} {metrics[name]['loss']:.3f}" for name in runs]
    figure.suptitle(
        f"Character language model, held-out loss: {', '.join(texts)} nats", fontsize=14
    )
    save_figure(path, figure, dpi=100)


def _losses(ax: Axes, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        steps = np.arange(1, run.step + 1)
        mean = running_mean(run.history["loss"], 50)
        label = f"{name}, training"
        ax.plot(steps, mean, color=_COLOURS[name], lw=0.8, alpha=0.6, label=label)
        held_out = run.history["held_out_loss"]
        known = np.isfinite(held_out)
        label = f"{name}, held out"
        ax.plot(
            steps[known], held_out[known], "o-", ms=3, color=_COLOURS[name], label=label
        )
    lowest = min(float(np.min(ax.get_lines()[i].get_ydata())) for i in range(4))
    ax.set(title="Loss", xlabel="step", ylabel="nats a character")
    ax.set_ylim(lowest - 0.1, max(lowest + 1.2, 3.0))


def _places(ax: Axes, looks: dict[str, dict[str, np.ndarray]]) -> None:
    for name, seen in looks.items():
        mean = np.mean(seen["losses"], axis=0)
        ax.plot(1 + np.arange(len(mean)), mean, color=_COLOURS[name], label=name)
    ax.set(
        title="Held-out loss by what can be seen",
        xlabel="characters seen",
        ylabel="nats a character",
    )


def _stopped(
    loss: Axes, residual: Axes, by_steps: dict[str, Any], metrics: dict[str, Any]
) -> None:
    for name, colour in (("plain iteration", GREY), ("Anderson", BLUE)):
        losses, residuals = (np.asarray(x) for x in by_steps[name])
        steps = 1 + np.arange(len(losses))
        loss.plot(steps, losses, color=colour, label=name)
        lines = residual.semilogy(steps, residuals.T, color=colour, lw=0.6, alpha=0.5)
        lines[0].set_label(f"{name}, {len(residuals)} windows")
    baseline = metrics["baseline"]["loss"]
    loss.axhline(baseline, color=ORANGE, ls="--", label="baseline, all windows")
    residual.axhline(TOLERANCE, color=GREEN, ls="--", label="tolerance in training")
    loss.set(
        title="Held-out loss of a solve cut short",
        xlabel="steps of the solver",
        ylabel="nats a character",
    )
    residual.set(
        title="Residual of the solve",
        xlabel="steps of the solver",
        ylabel="$|f(z) - z|$, root mean square",
    )


def _solves(steps: Axes, radius: Axes, run: Run) -> None:
    history = run.history
    x = np.arange(1, run.step + 1)
    for name, label, colour in (
        ("forward_steps_worst", "forward, worst of the batch", GREY),
        ("forward_steps", "forward, mean", BLUE),
        ("backward_steps", "backward", ORANGE),
    ):
        steps.plot(x, history[name], color=colour, lw=1, label=label)
    steps.set(title="Steps of the solver", xlabel="step", ylabel="steps a solve")
    steps.set_ylim(bottom=0)
    known = np.isfinite(history["spectral_radius"])
    radius.plot(
        x[known],
        history["spectral_radius"][known],
        "o-",
        ms=3,
        color=BLUE,
        label="mean",
    )
    radius.axhline(1.0, color=GREY, ls="--", label="plain iteration converges below")
    radius.set(
        title="Spectral radius of the Jacobian",
        xlabel="step",
        ylabel="held-out windows",
    )
    radius.set_ylim(bottom=0)
