"""A training loop that can be killed at any moment and resumed, to the bit.

What a step does may depend on the model, the state of the optimiser and the number of
the step alone: then a run that was resumed ends as one that never was interrupted.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import checkpoint
import equinox as eqx
import numpy as np
import optax
from command_line import integer, progress_bar


class Run(eqx.Module):
    """All that a run has come to: what a checkpoint holds."""

    model: Any
    opt_state: optax.OptState
    step: int
    seconds: float
    history: dict[str, np.ndarray]  # One number a step, NaN where there is none.


def start_run(
    model: Any,
    optimiser: optax.GradientTransformation,
    *,
    num_steps: int,
    names: Iterable[str],
) -> Run:
    """**Arguments:**

    - `names`: Of all figures that steps and assessments will return.
    """
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    history = {name: np.full(num_steps, np.nan) for name in names}
    return Run(model, opt_state, step=0, seconds=0.0, history=history)


def train(
    run: Run,
    train_step: Callable[[Any, Any, int], tuple[Any, Any, dict[str, Any]]],
    *,
    num_steps: int,
    save: Callable[[Run], Run],
    save_every: int,
    assess: Callable[[Any], dict[str, Any]] | None = None,
    assess_every: int = 1,
    show: Callable[[dict[str, float]], str] = lambda row: f"loss {row['loss']:.3f}",
) -> Run:
    """**Arguments:**

    - `train_step`: `(model, opt_state, step)` to the next two, and figures of the step.
    - `save`: Writes a checkpoint; as `checkpoints` returns it.
    - `assess`: Figures of a model, taken after every `assess_every` steps and after the
        last.
    - `show`: The latest figures, those of the last assessment included, for the
        progress bar.
    """
    if run.step == 0:
        # Saved first, so that no checkpoint of an earlier run outlives the start.
        run = save(run)
    with progress_bar(num_steps, run.step, disable=run.step == num_steps) as bar:
        while run.step < num_steps:
            model, opt_state, row = train_step(run.model, run.opt_state, run.step)
            step = run.step + 1
            if assess is not None and (step % assess_every == 0 or step == num_steps):
                row = {**row, **assess(model)}
            history = {k: v.copy() for k, v in run.history.items()}
            for name, value in row.items():
                history[name][run.step] = float(value)
            run = dataclasses.replace(
                run, model=model, opt_state=opt_state, step=step, history=history
            )
            text = f"step {step}/{num_steps}, {show(latest(run))}"
            bar.set_description_str(text, refresh=False)
            bar.update()
            if step % save_every == 0 or step == num_steps:
                run = save(run)
    return run


def latest(run: Run) -> dict[str, float]:
    """The last number that each figure had, NaN if it had none."""
    known = {k: v[np.isfinite(v)] for k, v in run.history.items()}
    return {k: float(v[-1]) if v.size else math.nan for k, v in known.items()}


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, name: str) -> None:
    """The flags that all such examples have.

    **Arguments:**

    - `steps`: How many there are, unless given.
    - `name`: Of the folder in `runs` for the files, unless given.
    """
    add, many = parser.add_argument, integer(1, 10**7)
    add("--seed", type=integer(0, 2**31 - 1), default=0, help="of all random [0]")
    add("--steps", type=many, help=f"[{steps}; {steps // 50} with --quick]")
    out = Path("runs") / name
    add("--out", type=Path, default=out, help=f"folder for the files [{out}]")
    add("--quick", action="store_true", help="a short run, to see that all works")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    help = "write a checkpoint so often [100]"
    add("--save-every", type=many, default=100, metavar="STEPS", help=help)


def parse(parser: argparse.ArgumentParser, *, steps: int) -> argparse.Namespace:
    """The arguments, the number of steps filled in and the folder made."""
    args = parser.parse_args()
    if args.steps is None:
        args.steps = steps // 50 if args.quick else steps
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {args.out} is no folder: {error.strerror}")
    return args


def checkpoints(
    args: argparse.Namespace, run: Run, config: dict[str, Any], *, name: str
) -> tuple[Run, Callable[[Run], Run]]:
    """Where the run goes on from, and what saves it.

    **Arguments:**

    - `run`: A fresh one.
    - `config`: What the run depends on, in JSON's types.
    - `name`: Of the checkpoint, if the run is one of several in the folder.
    """
    path = args.out / f"{name}.eqx"
    if args.resume and path.exists():
        try:
            run = checkpoint.load(path, run, config)
        except checkpoint.CheckpointError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: error: argument --resume: {error}")
        print(f"Going on from {path}, after {run.step} steps.", flush=True)
    elif args.resume:
        print(f"There is no checkpoint {path} yet: starting anew.", flush=True)
    elif path.exists():
        end = "which --resume would go on from"
        print(f"Starting anew, which replaces {path}, {end}.", flush=True)
    started = time.monotonic() - run.seconds  # As if never interrupted.

    def save(run: Run) -> Run:
        run = dataclasses.replace(run, seconds=time.monotonic() - started)
        checkpoint.save(path, run, config)
        return run

    return run, save
