"""Train an equilibrium language model on Python's own documentation.

    python examples/language.py

One block of a transformer, whose output is fed back to it until it no longer changes,
against the same block applied once: the same parameters, the same batches, the same
number of steps of the optimiser. The model is in `language_model.py`.
"""

import argparse
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import language_model
import numpy as np
import training
from command_line import integer, run_resumable
from language_data import batch, load_text, Text, windows
from language_measure import assess
from language_model import baseline_of, equilibrium_model, LanguageModel, Sizes, update
from language_report import finish


_NUM_STEPS = 1500
_NUM_ASSESSED = 128  # Windows that are looked at in training.
_HISTORY = (
    *("loss", "held_out_loss", "forward_steps", "forward_steps_worst"),
    *("failed_forward", "backward_steps", "failed_backward", "backward_residual"),
    "spectral_radius",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an equilibrium language model.")
    training.add_arguments(parser, steps=_NUM_STEPS, name="language")
    add, sizes = parser.add_argument, integer(1, 4096)
    add("--features", type=sizes, default=96, help="of the state, a character [96]")
    add("--heads", type=sizes, default=4, help="of the attention [4]")
    add("--width", type=sizes, default=256, help="of the perceptron [256]")
    add("--length", type=integer(2, 4096), default=64, help="characters a window [64]")
    add("--batch-size", type=sizes, default=32, help="windows a step [32]")
    add(
        "--longer",
        type=integer(0, 1000),
        default=0,
        metavar="TIMES",
        help="train the baseline for so many times the steps as well [0: do not]",
    )
    args = training.parse(parser, steps=_NUM_STEPS)
    if args.features % (2 * args.heads) != 0:
        parser.error("argument --features: must be a multiple of twice --heads")
    return args


def train(
    model: LanguageModel,
    args: argparse.Namespace,
    text: Text,
    *,
    num_steps: int,
    name: str,
) -> training.Run:
    optimiser = language_model.make_optimiser(num_steps)
    held_out = windows(text.held_out, args.length)
    spread = np.linspace(0, len(held_out) - 1, _NUM_ASSESSED).astype(int)
    assessed = jnp.asarray(held_out[spread])
    key = jr.key(args.seed)

    def train_step(model, opt_state, step):
        rows = batch(
            text.train, args.batch_size, args.length, seed=args.seed, step=step
        )
        step_key = jr.fold_in(key, step)
        return update(model, opt_state, jnp.asarray(rows), step_key, optimiser)

    run = training.start_run(model, optimiser, num_steps=num_steps, names=_HISTORY)
    config = _config(args, text) | {"steps": num_steps}
    run, save = training.checkpoints(args, run, config, name=name)
    return training.train(
        run,
        train_step,
        num_steps=num_steps,
        save=save,
        save_every=args.save_every,
        assess=lambda model: assess(model, assessed),
        assess_every=max(1, num_steps // 30),
        show=_show,
    )


def _show(row: dict[str, float]) -> str:
    text = f"loss {row['loss']:.3f}, held out {row['held_out_loss']:.3f}"
    if np.isfinite(row["forward_steps"]):
        text += f", {row['forward_steps']:.1f} steps"
    return text


def _config(args: argparse.Namespace, text: Text) -> dict[str, Any]:
    names = ("seed", "features", "heads", "width", "length", "batch_size")
    return {
        **{name: getattr(args, name) for name in names},
        "tolerance": language_model.TOLERANCE,
        "max_steps": language_model.MAX_STEPS,
        "num_terms": language_model.NUM_TERMS,
        "penalty": language_model.PENALTY,
        "learning_rate": language_model.LEARNING_RATE,
        "weight_decay": language_model.WEIGHT_DECAY,
        "dtype": jnp.zeros(()).dtype.name,
        "text": text.digest,
    }


def run_all(args: argparse.Namespace) -> None:
    text = load_text()
    sizes = Sizes(args.features, args.heads, args.width)
    num_symbols = len(text.characters)
    model = equilibrium_model(num_symbols, sizes, key=jr.key(args.seed))
    plan = {
        "equilibrium": (model, args.steps),
        "baseline": (baseline_of(model), args.steps),
    }
    if args.longer > 0:
        plan["longer"] = (baseline_of(model), args.longer * args.steps)
    runs = {}
    for name, (model, num_steps) in plan.items():
        print(f"Training: {name}, {num_steps:,} steps.", flush=True)
        runs[name] = train(model, args, text, num_steps=num_steps, name=name)
    finish(runs, text, args, _config(args, text))


if __name__ == "__main__":
    run_resumable(run_all, parse_args())
