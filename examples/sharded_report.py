"""The metrics file, the table and the figure of the sharded example."""

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from checkpoint import replace_file
from figures import (
    BLUE as _FORWARD,
    GREY as _OTHER,
    new_figure,
    ORANGE as _BACKWARD,
    running_mean,
    save_figure,
    tidy,
)
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from tables import two_columns


def read_rows(path: Path) -> list[dict[str, Any]]:
    """One row a step. What a run that died left of a line is no row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if "loss" in row]


def open_metrics(path: Path, num_steps: int) -> TextIO:
    """A file to append to, cut back to what a checkpoint after `num_steps` knows of."""
    rows = [row for row in read_rows(path) if row["step"] <= num_steps]
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return open(path, "a", buffering=1)


def write_row(file: TextIO, row: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(row) + "\n")
    except OSError as error:  # A full disk does not say which file it was.
        raise OSError(error.errno, error.strerror, file.name) from error


def table(rows: list[dict[str, Any]], assessed: dict[str, Any], size: int) -> str:
    total = lambda name: sum(row[name] for row in rows)
    of = f"(of {len(rows) * size:,})"
    lines = {
        "held-out accuracy": f"{assessed['held_out_accuracy']:.2%}",
        "loss, last step": f"{rows[-1]['loss']:.4f}",
        "forward steps, mean": f"{total('forward_steps') / len(rows):.2f}",
        "forward steps, worst": f"{max(r['forward_steps_worst'] for r in rows)}",
        "backward steps, mean": f"{total('backward_steps') / len(rows):.2f}",
        "backward steps, worst": f"{max(r['backward_steps_worst'] for r in rows)}",
        "failed forward solves": f"{total('failed_forward')}  {of}",
        "failed backward solves": f"{total('failed_backward')}  {of}",
    }
    return two_columns(lines)


def draw(path: Path, rows: list[dict[str, Any]], where: str) -> None:
    """**Arguments:**

    - `where`: On how many devices of how many processes.
    """
    figure, ((loss, solver),) = new_figure(1, 2, width=5, height=4)
    step = np.array([row["step"] for row in rows])
    column = lambda name: np.array([row[name] for row in rows])
    losses = column("loss")
    loss.semilogy(step, losses, color=_OTHER, lw=1, label="a batch")
    loss.semilogy(step, running_mean(losses), color=_FORWARD, lw=2, label="mean of 20")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    loss.set(title="Training loss", xlabel="step", ylabel="cross-entropy")
    for kind, colour in (("forward", _FORWARD), ("backward", _BACKWARD)):
        solver.plot(step, column(f"{kind}_steps"), color=colour, label=f"{kind}, mean")
        worst = column(f"{kind}_steps_worst")
        solver.plot(
            step, worst, color=colour, lw=0.5, alpha=0.6, label=f"{kind}, worst"
        )
    num_failed = int(sum(column("failed_forward") + column("failed_backward")))
    title = f"Steps per solve, {num_failed} failed solves"
    solver.set(title=title, xlabel="step", ylabel="steps of the solver")
    solver.set_ylim(bottom=0)
    for ax in (loss, solver):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(ax)
    figure.suptitle(f"Equilibrium classifier, data-parallel over {where}")
    save_figure(path, figure, dpi=110)
