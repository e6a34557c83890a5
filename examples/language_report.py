"""The tables, the figure and the files at the end of the language example."""

import argparse
import hashlib
import json
import math
from typing import Any

import checkpoint
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from language_data import Text, windows
from language_figure import draw
from language_measure import (
    leak,
    look,
    losses_by_steps,
    TIGHT,
    tightly,
    write,
)
from language_model import LanguageModel
from tables import num_parameters, or_none, two_columns
from training import Run


_NUM_LAST = 100  # Steps of training that "at the end" means.
_NUM_LOOKED_AT = 64  # Windows of what costs more than one solve.


def finish(
    runs: dict[str, Run], text: Text, args: argparse.Namespace, config: dict[str, Any]
) -> None:
    """Measure the models, print the tables, write the files."""
    rows = windows(text.held_out, args.length)
    some = rows[np.linspace(0, len(rows) - 1, _NUM_LOOKED_AT).astype(int)]
    looks = {name: look(run.model, rows) for name, run in runs.items()}
    metrics: dict[str, Any] = {
        name: _figures(run, looks[name], args.batch_size) for name, run in runs.items()
    }
    model = runs["equilibrium"].model
    # What counts is the loss of the equilibrium, which is causal: that of an iterate
    # may draw on later characters by as much as its tolerance.
    looks["equilibrium"] = look(tightly(model), rows)
    metrics["loss_usual"] = metrics["equilibrium"]["loss"]
    metrics["equilibrium"]["loss"] = float(np.mean(looks["equilibrium"]["losses"]))
    metrics["failed_tight"] = int(np.sum(looks["equilibrium"]["is_failed"]))
    metrics |= {"leak": leak(model, some), "leak_tight": leak(tightly(model), some)}
    metrics |= _written(model, rows[0, :-1], text.characters, args.seed)
    metrics |= {"num_parameters": num_parameters(model), "config": config}
    for name, run in runs.items():
        parameters = checkpoint.serialise(run.model)
        metrics[name]["sha256"] = hashlib.sha256(parameters).hexdigest()
        checkpoint.replace_file(args.out / f"{name}.final.eqx", parameters)
        history = {k: [or_none(x) for x in v] for k, v in run.history.items()}
        metrics[name]["history"] = history
    content = json.dumps(metrics, indent=1)
    checkpoint.replace_file(args.out / "metrics.json", content.encode())
    by_steps = losses_by_steps(model, jnp.asarray(some))
    draw(args.out / "language.png", runs, looks, by_steps, metrics)
    print(f"\n{comparison(metrics, list(runs))}\n\n{about_the_solves(metrics)}")
    print(f"\nAfter {metrics['prompt']!r} it writes:\n\n{metrics['written']}\n")
    print(f"In {args.out}: metrics.json, language.png and the models.")


def _written(
    model: LanguageModel, prompt: np.ndarray, characters: str, seed: int
) -> dict[str, Any]:
    go_on = lambda is_warm: write(
        model, jnp.asarray(prompt), characters, is_warm=is_warm, key=jr.key(seed)
    )
    (written, warm), (_, cold) = go_on(True), go_on(False)
    return {
        "prompt": "".join(characters[i] for i in prompt),
        "written": written,
        "steps_warm": float(np.mean(warm)),
        "steps_cold": float(np.mean(cold)),
    }


def _figures(run: Run, seen: dict[str, np.ndarray], size: int) -> dict[str, Any]:
    history, end = run.history, slice(-_NUM_LAST, None)
    is_solved = np.isfinite(history["forward_steps"]).all()
    forward, backward = history["forward_steps"], history["backward_steps"]
    # The last of the steps forward tests itself; one evaluation more is linearised.
    cost = {"evaluations": 1.0, "products": 1.0}
    if is_solved:
        cost = {
            "evaluations": float(np.mean(forward)) + 2,
            "products": float(np.mean(backward)) + 1,
        }
    figures = {
        "steps": run.step,
        "loss": float(np.mean(seen["losses"])),
        "training_loss": float(np.mean(history["loss"][end])),
        "seconds": run.seconds,
        "seconds_a_step": run.seconds / run.step,
        **cost,
        "solves": run.step * size if is_solved else 0,
        "failed_forward": int(np.nansum(history["failed_forward"])),
        "failed_backward": int(np.nansum(history["failed_backward"])),
        "worst_forward": int(np.nanmax(history["forward_steps_worst"], initial=0)),
        "forward_steps": float(np.mean(forward[end])),
        "backward_steps": float(np.mean(backward[end])),
        "backward_residual": float(np.mean(history["backward_residual"][end])),
        "held_out_steps": float(np.mean(seen["steps"])),
        "held_out_worst": int(np.max(seen["steps"])),
        "held_out_failed": int(np.sum(seen["is_failed"])),
        "held_out_windows": len(seen["steps"]),
        "spectral_radius": float(history["spectral_radius"][-1]),
    }
    return {k: or_none(v) if isinstance(v, float) else v for k, v in figures.items()}


def comparison(metrics: dict[str, Any], names: list[str]) -> str:
    """A column a model."""
    rows = {
        "held-out loss, nats a character": lambda m: f"{m['loss']:.4f}",
        "held-out loss, bits a character": lambda m: f"{m['loss'] / math.log(2):.4f}",
        "training loss at the end": lambda m: f"{m['training_loss']:.4f}",
        "steps of the optimiser": lambda m: f"{m['steps']:,}",
        "evaluations of the cell, mean": lambda m: f"{m['evaluations']:.1f}",
        "products with its Jacobian, mean": lambda m: f"{m['products']:.1f}",
        "seconds, with compilation": lambda m: f"{m['seconds']:.0f}",
    }
    lines = [f"{'':<32}" + "".join(f"  {name:>11}" for name in names)]
    for label, cell in rows.items():
        cells = (f"  {cell(metrics[name]):>11}" for name in names)
        lines.append(f"{label:<32}" + "".join(cells))
    return "\n".join(lines)


def about_the_solves(metrics: dict[str, Any]) -> str:
    m = metrics["equilibrium"]
    of = f"of {m['solves']:,} in training"
    held = f"of {m['held_out_windows']:,} windows"
    rows = {
        "parameters, of each model": f"{metrics['num_parameters']:,}",
        "forward steps, mean": f"{m['held_out_steps']:.2f}  ({held} held out)",
        "forward steps, worst": f"{m['held_out_worst']}"
        f"  ({m['worst_forward']} in training)",
        "backward steps": f"{m['backward_steps']:.2f}",
        "failed forward solves": f"{m['failed_forward']}  ({of}),"
        f" {m['held_out_failed']}  ({held})",
        "failed backward solves": f"{m['failed_backward']}  ({of})",
        "residual of the gradient": f"{m['backward_residual']:.1%}"
        "  (of the backward solves, at the end)",
        "spectral radius": f"{m['spectral_radius']:.2f}",
        "loss, solved as in training": f"{metrics['loss_usual']:.4f}"
        f"  (above to {TIGHT:g}, {metrics['failed_tight']} failed)",
        "change by later characters": f"{metrics['leak']:.1e}"
        f"  (solved to {TIGHT:g}: {metrics['leak_tight']:.1e})",
        "steps a character written": f"{metrics['steps_warm']:.2f}"
        f"  (not warm-started: {metrics['steps_cold']:.2f})",
    }
    return two_columns(rows)
