"""Train an equilibrium classifier on scikit-learn's handwritten digits.

    python examples/digits.py

The hidden state is not computed by a stack of layers but defined by an equation,
`z = tanh(W z + U x + b)`, and its gradient by the implicit function theorem. The model
is in `digits_model.py`.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from command_line import integer, progress_bar, run_resumable
from digits_data import batches, load_data, NUM_TRAIN
from digits_measure import assess, count, COUNTS, HISTORY, summarise
from digits_model import (
    Classifier,
    gradients,
    LARGEST_NORM,
    LEARNING_RATE,
    make_optimiser,
    TOLERANCE,
    update,
    WEIGHT_DECAY,
)
from digits_report import finish


class Run(eqx.Module):
    """All that a run has come to: what a checkpoint holds."""

    model: Classifier
    opt_state: optax.OptState
    step: int
    seconds: float
    sums: dict[str, float]  # Over the epoch so far.
    counts: dict[str, int]  # Over the whole run.
    history: dict[str, np.ndarray]  # One number an epoch, and one before the first.


def start_run(config: dict[str, Any]) -> Run:
    model = Classifier(config["features"], key=jr.key(config["seed"]))
    params = eqx.filter(model, eqx.is_inexact_array)
    return Run(
        model,
        make_optimiser(1).init(params),
        step=0,
        seconds=0.0,
        sums={"loss": 0.0, "accuracy": 0.0},
        counts=dict.fromkeys(COUNTS, 0),
        history={k: np.full(config["epochs"] + 1, np.nan) for k in HISTORY},
    )


def train_step(run: Run, images, labels, optimiser) -> tuple[Run, dict[str, Any]]:
    grads, aux = gradients(run.model, images, labels)
    model, opt_state = update(run.model, run.opt_state, grads, optimiser)
    aux = jax.device_get(aux)
    sums = {
        "loss": run.sums["loss"] + float(aux["loss"]),
        "accuracy": run.sums["accuracy"] + float(np.mean(aux["is_correct"])),
    }
    run = dataclasses.replace(
        run,
        model=model,
        opt_state=opt_state,
        step=run.step + 1,
        sums=sums,
        counts=count(run.counts, aux),
    )
    return run, aux


def end_epoch(run: Run, held_out: list[np.ndarray], per_epoch: int) -> Run:
    epoch = run.step // per_epoch
    aux = jax.device_get(assess(run.model, *held_out))
    row = summarise(run.model, aux)
    if epoch > 0:
        row |= {f"train_{k}": v / per_epoch for k, v in run.sums.items()}
    history = {k: v.copy() for k, v in run.history.items()}
    for name, value in row.items():
        history[name][epoch] = value
    counts, sums = count(run.counts, aux), dict.fromkeys(run.sums, 0.0)
    return dataclasses.replace(run, history=history, counts=counts, sums=sums)


def train(
    run: Run,
    data: tuple[np.ndarray, ...],
    config: dict[str, Any],
    save: Callable[[Run], Run],
    save_every: int,
) -> Run:
    images, labels, *held_out = data
    size, seed, epochs = (config[k] for k in ("batch_size", "seed", "epochs"))
    per_epoch = len(labels) // size
    optimiser = make_optimiser(epochs * per_epoch)
    if run.step == 0:
        # Saved first, so that no checkpoint of an earlier run outlives the start.
        run = end_epoch(save(run), held_out, per_epoch)
    if run.step == epochs * per_epoch:
        return run
    with progress_bar(epochs * per_epoch, run.step) as bar:
        while run.step < epochs * per_epoch:
            epoch, num_done = divmod(run.step, per_epoch)
            for i, batch in enumerate(batches(images, labels, size, seed, epoch)):
                if i < num_done:
                    continue
                run, aux = train_step(run, *batch, optimiser)
                bar.set_description_str(
                    f"epoch {epoch + 1}/{epochs}, "
                    f"loss {run.sums['loss'] / (i + 1):.3f}, "
                    f"accuracy {run.sums['accuracy'] / (i + 1):.1%}, "
                    f"steps {np.mean(aux['forward_steps']):.1f} forward "
                    f"{np.mean(aux['backward_steps']):.1f} back",
                    refresh=False,
                )
                bar.update()
                if save_every and run.step % save_every == 0 and i + 1 < per_epoch:
                    run = save(run)
            run = save(end_epoch(run, held_out, per_epoch))
    return run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an equilibrium classifier.")
    add = parser.add_argument
    many, seeds, sizes = integer(1, 9999), integer(0, 2**31 - 1), integer(1, NUM_TRAIN)
    add("--seed", type=seeds, default=0, help="of all that is random [0]")
    add("--epochs", type=many, help="[60; 3 with --quick]")
    add("--batch-size", type=sizes, default=64, help="images a step [64]")
    add("--features", type=many, default=64, help="size of the hidden state [64]")
    add("--out", type=Path, default=Path("runs/digits"), help="[runs/digits]")
    add("--quick", action="store_true", help="a short run, to see that all works")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add(
        "--save-every",
        type=integer(0, 10**9),
        default=0,
        metavar="STEPS",
        help="write checkpoints within epochs as well [0: only after epochs]",
    )
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 3 if args.quick else 60
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {args.out} is no folder: {error.strerror}")
    return args


def resume(path: Path, run: Run, config: dict[str, Any]) -> Run:
    if not path.exists():
        print(f"There is no checkpoint {path} yet: starting anew.", flush=True)
        return run
    try:
        run = checkpoint.load(path, run, config)
    except checkpoint.CheckpointError as error:
        sys.exit(f"digits.py: error: argument --resume: {error}")
    print(f"Going on from {path}, after {run.step} steps.", flush=True)
    return run


def run_all(args: argparse.Namespace) -> None:
    start = time.monotonic()
    config = {
        "seed": args.seed,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "features": args.features,
        "dtype": jnp.zeros(()).dtype.name,
        "tolerance": TOLERANCE,
        "largest_norm": LARGEST_NORM,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
    }
    path, run = args.out / "checkpoint.eqx", start_run(config)
    if args.resume:
        run = resume(path, run, config)
    elif path.exists():
        print(
            f"Starting anew, which replaces {path}; --resume would go on from it.",
            flush=True,
        )
    started = start - run.seconds  # As if it had never been interrupted.

    def save(run: Run) -> Run:
        run = dataclasses.replace(run, seconds=time.monotonic() - started)
        checkpoint.save(path, run, config)
        return run

    data = load_data()
    run = train(run, data, config, save, args.save_every)
    images, labels, *held_out = data
    batch = (images.reshape(-1, 64)[: args.batch_size], labels[: args.batch_size])
    finish(
        run.model,
        run.history,
        run.counts,
        held_out,
        batch,
        config,
        started=started,
        out=args.out,
    )


def main() -> None:
    run_resumable(run_all, parse_args())


if __name__ == "__main__":
    main()
