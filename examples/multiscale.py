"""Train an equilibrium of several resolutions on scikit-learn's handwritten digits.

    python examples/multiscale.py

The state of the classifier is an image of 8 by 8 pixels, one of 4 by 4 and one of 2 by
2, which reach equilibrium together (Bai, Koltun and Kolter 2020). A penalty on the
Jacobian keeps the solves short. The model is in `multiscale_model.py`.
"""

import argparse
import functools as ft
import math

import jax.numpy as jnp
import jax.random as jr
import multiscale_model
import training
from command_line import integer, run_resumable
from digits_data import batches, load_data
from multiscale_measure import summarise
from multiscale_report import finish


FIGURES = (
    *("loss", "train_accuracy", "jacobian"),
    *("forward", "forward_worst", "forward_failed"),
    *("backward", "backward_worst", "backward_failed"),
    *("held_out_loss", "accuracy", "steps", "failed"),
)
_BATCH = 64
_NUM_STEPS = 420  # Twenty epochs.


def _weight(text: str) -> float:
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"expected 0 to 100; got {text!r}")
    return value


def _show(row: dict[str, float]) -> str:
    text = (
        f"loss {row['loss']:.3f}, steps {row['forward']:.0f} forward "
        f"{row['backward']:.0f} back"
    )
    known = math.isfinite(row["accuracy"])
    return text + f", held out {row['accuracy']:.1%}" * known


def run_all(args: argparse.Namespace) -> None:
    config = {
        "seed": args.seed,
        "steps": args.steps,
        "channels": args.channels,
        "penalty": args.penalty,
        "groups": multiscale_model.GROUPS,
        "tolerance": multiscale_model.TOLERANCE,
        "max_steps": multiscale_model.MAX_STEPS,
        "learning_rate": multiscale_model.LEARNING_RATE,
        "weight_decay": multiscale_model.WEIGHT_DECAY,
        "dtype": jnp.zeros(()).dtype.name,
    }
    images, labels, *held_out = load_data()
    optimiser = multiscale_model.make_optimiser(args.steps)
    model = multiscale_model.Classifier(args.channels, key=jr.key(args.seed))
    run = training.start_run(model, optimiser, num_steps=args.steps, names=FIGURES)
    run, save = training.checkpoints(args, run, config, name="checkpoint")
    per_epoch = len(labels) // _BATCH
    penalty = jnp.asarray(args.penalty)

    @ft.lru_cache(maxsize=1)
    def of_epoch(epoch):
        return list(batches(images, labels, _BATCH, args.seed, epoch))

    def step(model, opt_state, i):
        batch = of_epoch(i // per_epoch)[i % per_epoch]
        shown, digits = map(jnp.asarray, batch)
        key = jr.fold_in(jr.key(args.seed), i)
        grads, row = multiscale_model.gradients(model, shown, digits, penalty, key)
        return *multiscale_model.update(model, opt_state, grads, optimiser), row

    run = training.train(
        run,
        step,
        num_steps=args.steps,
        save=save,
        save_every=args.save_every,
        assess=lambda model: summarise(model, *held_out),
        assess_every=per_epoch,
        show=_show,
    )
    finish(run, config, held_out, batch_size=_BATCH, out=args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a multiscale equilibrium.")
    training.add_arguments(parser, steps=_NUM_STEPS, name="multiscale")
    add, few = parser.add_argument, integer(1, 256)
    help = "at 8 by 8 pixels, at 4 by 4, at 2 by 2 [8 12 16]"
    add("--channels", type=few, nargs="+", default=[8, 12, 16], help=help)
    help = "weight of the penalty on the Jacobian [1]"
    add("--penalty", type=_weight, default=1.0, metavar="WEIGHT", help=help)
    args = training.parse(parser, steps=_NUM_STEPS)
    groups = multiscale_model.GROUPS
    if len(args.channels) > 3 or any(c % groups for c in args.channels):
        parser.error(
            "argument --channels: expected up to three multiples of "
            f"{groups}; got {' '.join(map(str, args.channels))}"
        )
    run_resumable(run_all, args)


if __name__ == "__main__":
    main()
