"""Is an equilibrium one? Three ways to train one cell, and a layer that is a no-op.

    python -m bench.papers.real_equilibrium [--plots FOLDER] [--json FILE]

Which nodes are connected to a marked one is learnt on small graphs and asked on long
paths: the question of Anil et al. 2022, whether a model that ends at one place wherever
it starts gets better by more steps on harder problems, on a task of ours.
"""

from pathlib import Path
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from tqdm import tqdm

from . import reachability
from .plots import COLOURS, panels, save
from .reachability import fn, KINDS, Model, random_start, two_paths, zeros
from .report import Claim, main, Report


SEEDS = range(3)
LENGTHS = (4, 8, 16, 32)
ITERATIONS = (4, 8, 16, 32, 64, 128, 256)
HARD = 32  # The length at which alignment and accuracy are compared.
SIGNS = 16  # That at which the signs are looked for.
NUM_STARTS = 4
_PLAIN = eqlx.FixedPointIteration(0.0, 1e-6)
_FIXED = eqlx.FixedPointIteration(0.0, 0.0)
FIGURES = (
    *("change_from_start", "change_from_image"),
    *("spread", "num_equilibria", "num_failed"),
)


@eqx.filter_jit
def _accuracies(model: Model, x, reached, start):
    """After each number of iterations, on one graph from one start."""
    points = eqlx.iterates(fn, _FIXED, start, (model.cell, x), indices=ITERATIONS)
    logits = jax.vmap(model.readout, in_axes=(0, None))(points, x[1])
    return jnp.mean((logits > 0) == reached[None], axis=1)


@eqx.filter_jit
def _signs(model: Model, x, other, key):
    """**Arguments:**

    - `other`: The same graph with another mark, whose solution is a start.
    """
    args = (model.cell, other)
    ended = eqlx.fixed_point(fn, _PLAIN, zeros(x), args, max_steps=512, throw=False)
    starts = jax.vmap(random_start, in_axes=(None, 0))(x, jr.split(key, NUM_STARTS))
    return eqlx.equilibrium_signs(
        fn,
        _PLAIN,
        zeros(x),
        (model.cell, x),
        starts=jnp.concatenate([ended.value[None], starts]),
        output=lambda z: model.readout(z, x[1]),
        max_steps=512,
    )


def measure(model: Model, lengths=LENGTHS) -> dict[str, Any]:
    """Signs, and accuracy by path length and iterations: from zero, and at random."""
    found: dict[str, Any] = {"zero": {}, "random": {}}
    for length in lengths:
        edges, marked, reached = map(jnp.asarray, two_paths(length))
        x = (edges, marked)
        found["zero"][length] = np.asarray(_accuracies(model, x, reached, zeros(x)))
        keys = jr.split(jr.key(length), NUM_STARTS)
        each = [_accuracies(model, x, reached, random_start(x, k)) for k in keys]
        found["random"][length] = np.mean(each, axis=0)
    edges, marked, _ = map(jnp.asarray, two_paths(SIGNS))
    other = (edges, jnp.roll(marked, SIGNS))
    signs = jax.device_get(_signs(model, (edges, marked), other, jr.key(0)))
    found |= {name: float(getattr(signs, name)) for name in FIGURES}
    found["alignment"] = float(signs.alignment[0])
    found["alignment_random"] = float(np.mean(signs.alignment[1:]))
    return found


Found = dict[str, list[dict[str, Any]]]


def _all(found: Found, name: str, digits: int = 2) -> list[str]:
    each = (", ".join(f"{m[name]:.{digits}f}" for m in ms) for ms in found.values())
    return list(each)


def _tables(found: Found) -> dict[str, list[list[str]]]:
    head = ["", *found]
    names = ("alignment", "alignment_random", "spread", "change_from_start")
    signs = [[n, *_all(found, n)] for n in (*names, "change_from_image")]
    signs += [[n, *_all(found, n, 0)] for n in ("num_equilibria", "num_failed")]
    by_length = [
        [f"{length}, from {start}"]
        + [
            ", ".join(f"{m[start][length][-1]:.2f}" for m in ms)
            for ms in found.values()
        ]
        for length in LENGTHS
        for start in ("zero", "random")
    ]
    by_number = [
        [f"{num}"]
        + [", ".join(f"{m['zero'][HARD][i]:.2f}" for m in ms) for ms in found.values()]
        for i, num in enumerate(ITERATIONS)
    ]
    return {
        f"Signs on two paths of {SIGNS} nodes, by seed": [head, *signs],
        f"Accuracy after {ITERATIONS[-1]} iterations, by length": [head, *by_length],
        f"Accuracy at length {HARD} from zero, by iterations": [head, *by_number],
    }


def _points(found: Found, start: str) -> tuple[np.ndarray, np.ndarray]:
    """Alignment and accuracy at the hard length, of each model that reads its state."""
    models = [m for name, ms in found.items() if name != "no-op" for m in ms]
    accuracy = [m[start][HARD][-1] for m in models]
    return np.array([m["alignment"] for m in models]), np.array(accuracy)


_NOTES = {
    "zero": "from there a signal that keeps itself alive reaches any distance",
    "random": "nine models of three kinds: a sign, no statistics",
}


def _claims(found: Found) -> list[Claim]:
    claims = []
    for start in ("zero", "random"):
        r = float(np.corrcoef(*_points(found, start))[0, 1])
        what = f"correlation of alignment and accuracy, length {HARD}, from {start}"
        claims.append(
            Claim(what, "positive, strong", f"{r:.2f}", r > 0.5, _NOTES[start])
        )
    first, last = (
        np.mean([m["zero"][SIGNS][i] for m in found["equilibrium"]]) for i in (0, -1)
    )
    more = f"{first:.2f} after {ITERATIONS[0]}, {last:.2f} after {ITERATIONS[-1]}"
    what = f"more steps help the equilibrium on length {SIGNS}"
    claims.append(Claim(what, "yes", more, bool(last > first + 0.1)))
    change = max(m["change_from_start"] for m in found["no-op"])
    claims.append(
        Claim("change from the start, no-op", "-", f"{change:g}", change == 0)
    )
    return claims


def run(plots: Path | None) -> Report:
    num_steps = reachability.NUM_STEPS
    found: Found = {}
    total = len(KINDS) * len(SEEDS) * num_steps
    with tqdm(total=total, desc="training", leave=False) as bar:
        for name, kind in KINDS.items():
            models = reachability.train(kind, SEEDS, num_steps, bar.update)
            found[name] = [measure(model) for model in models]
    if plots is not None:
        _plot(plots / "real_equilibrium.png", found)
    inputs = (
        f"Forests of {reachability.NUM_NODES} nodes, {reachability.BATCH} a step, "
        f"{num_steps} steps of Adam at {reachability.LEARNING_RATE}, "
        f"{reachability.FEATURES} features a node, float64, seeds 0 to "
        f"{len(SEEDS) - 1}. Asked on two paths, half of whose nodes are connected. "
        "The first alignment is with the solution for another mark, the second with "
        f"those from {NUM_STARTS} starts at random."
    )
    source = "Anil et al. 2022 in question; the task is ours"
    return Report(source, inputs, _claims(found), _tables(found))


def _plot(path: Path, found: Found) -> None:
    titles = [f"Length {HARD}, from zero", f"Length {HARD}, from random starts"]
    figure, axes = panels([*titles, "By alignment"])
    for ax, start in zip(axes, ("zero", "random"), strict=False):
        for colour, (name, models) in zip(COLOURS, found.items(), strict=False):
            mean = np.mean([m[start][HARD] for m in models], axis=0)
            ax.plot(ITERATIONS, mean, "o-", color=colour, markersize=4, label=name)
        ax.set(xscale="log", xlabel="iterations")
    colours = [c for c, name in zip(COLOURS, found, strict=False) if name != "no-op"]
    alignment, accuracy = _points(found, "zero")
    axes[2].scatter(alignment, accuracy, c=np.repeat(colours, len(SEEDS)))
    axes[2].set(xlabel="alignment", xticks=[-1, 0, 1])
    for ax in axes:
        ax.set(yscale="linear", ylim=(0.4, 1.05))
    axes[0].set(ylabel="accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main({"real_equilibrium": run}, __doc__)
