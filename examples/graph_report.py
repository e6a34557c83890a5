"""The table, the figure and the files at the end of the graph example."""

import hashlib
import json
from pathlib import Path
from typing import Any

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
from figures import BLUE, GREY, new_figure, ORANGE, running_mean, save_figure, tidy
from graph_data import batch, chain
from graph_model import assess, Classifier, TOLERANCE
from matplotlib.figure import Figure
from tables import num_parameters
from training import latest, Run


NUM_CHAINS = 200
NUM_NODES = 201
_SEED = 2**31  # None that `--seed` takes.
_DISTANCES = (1, 5, 20, 50, 100, 150, 200)
_COLOURS = (BLUE, GREY, ORANGE)


def measure(model: Classifier) -> dict[str, Any]:
    """Held-out chains, longer than those trained on: figures by distance."""
    inputs, labels = map(jnp.asarray, batch(NUM_CHAINS, NUM_NODES, seed=_SEED, step=0))
    aux = jax.device_get(assess(model, inputs, labels, chain(NUM_NODES)))
    return {
        "parameters": num_parameters(model),
        "accuracy": np.mean(aux["is_correct"], axis=0).tolist(),
        "size": np.median(aux["sizes"], axis=0).tolist(),
        "steps": float(np.mean(aux["steps"])),
        "failed": int(np.sum(~aux["is_solved"])),
    }


def finish(runs: dict[str, Run], config: dict[str, Any], out: Path) -> None:
    """Measure, print the table, write the parameters, the metrics and the figure."""
    found = {name: measure(run.model) for name, run in runs.items()}
    for name, run in runs.items():
        found[name]["loss"] = latest(run)["loss"]
        found[name]["failed_in_training"] = int(np.nansum(run.history["failed"]))
        found[name]["seconds"] = run.seconds
    parameters = checkpoint.serialise([run.model for run in runs.values()])
    digest = hashlib.sha256(parameters).hexdigest()
    metrics = {"models": found, "sha256": digest, "config": config}
    checkpoint.replace_file(out / "final.eqx", parameters)
    text = json.dumps(metrics, indent=1)
    checkpoint.replace_file(out / "metrics.json", text.encode())
    save_figure(out / "graph.png", _figure(runs, found, config))
    print(f"\n{_table(found)}\n")
    print(f"sha256 of the parameters  {digest}")
    print(f"In {out}: final.eqx, metrics.json, graph.png")


def _table(found: dict[str, Any]) -> str:
    models = found.values()
    rows = {"": list(found), "parameters": [f"{m['parameters']}" for m in models]}
    for distance in _DISTANCES:
        cells = [f"{m['accuracy'][distance]:.1%}" for m in models]
        rows[f"accuracy after {distance} edge{'s' * (distance > 1)}"] = cells
    rows |= {
        "loss, last step": [f"{m['loss']:.3f}" for m in models],
        f"steps, {NUM_NODES} nodes": [f"{m['steps']:.0f}" for m in models],
        "failed solves": [f"{m['failed'] + m['failed_in_training']}" for m in models],
        "seconds": [f"{m['seconds']:.0f}" for m in models],
    }
    width = max(map(len, rows))
    lines = (f"{k:<{width}}" + "".join(f"{c:>13}" for c in v) for k, v in rows.items())
    return "\n".join(lines)


def _figure(runs: dict[str, Run], found: dict[str, Any], config) -> Figure:
    figure, axes = new_figure(1, 3)
    accuracy, size, loss = axes[0]
    distances = np.arange(NUM_NODES)
    for colour, (name, m) in zip(_COLOURS, found.items(), strict=True):
        share = 100 * running_mean(np.array(m["accuracy"]), 5)
        accuracy.plot(distances, share, color=colour, label=name)
        seen = np.array(m["size"])
        size.semilogy(distances[seen > 0], seen[seen > 0], color=colour, label=name)
        history = running_mean(runs[name].history["loss"], 10)
        loss.plot(np.arange(1, len(history) + 1), history, color=colour, label=name)
    accuracy.axvline(config["nodes"] - 1, color="k", lw=0.8, ls=":")
    end = (config["nodes"] + 2, 70)
    accuracy.annotate("where the chains of\nthe training end", end, fontsize=9)
    accuracy.set(
        title=f"Held-out accuracy, {NUM_CHAINS} chains",
        xlabel="edges to the node that knows",
        ylabel="per cent",
        ylim=(40, 102),
    )
    size.axhline(TOLERANCE, color="k", lw=0.8, ls="--", label="tolerance of the solve")
    size.set(
        title="Size of a node's state",
        xlabel="edges to the node that knows",
        ylabel="2-norm, median",
        ylim=(TOLERANCE / 100, 10),
    )
    loss.set(title="Training loss", xlabel="step", ylabel="cross-entropy", ylim=0)
    for ax in axes[0]:
        tidy(ax, legend=ax is size)  # The colours are the same in all.
    figure.suptitle(
        f"Implicit graph network on chains of {config['nodes']} nodes: an equilibrium, "
        "and as many parameters in so many layers",
        fontsize=13,
    )
    return figure
