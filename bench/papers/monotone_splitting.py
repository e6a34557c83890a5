"""The splittings of a monotone operator equilibrium, by the length of their step.

    python -m bench.papers.monotone_splitting [--plots FOLDER] [--json FILE]

Winston and Kolter 2020, section 3: for `W = (1 - m) I - A^T A + B - B^T` and
`L = ||I - W||_2` forward-backward splitting converges if `alpha < 2 m / L^2`,
Peaceman-Rachford splitting for every `alpha > 0`, both to the one equilibrium, and the
adjoint is a fixed point of the same splitting.
"""

from pathlib import Path

import equilax as eqlx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from tqdm import tqdm

from .monotone_layers import (
    all_active,
    bounds,
    injections,
    limits,
    Outcome,
    random_layers,
    sharp_layer,
    solve,
    TOLERANCE,
    worst,
)
from .plots import COLOURS, panels, save
from .report import Claim, main, Report


SIZE, NUM_SEEDS = 32, 20
MARGINS = (1.0, 0.1)
ALPHAS = tuple(10.0 ** np.arange(-2, 2.25, 0.5))
LIMIT = 1e-6  # For differences from a dense solution.
FACTORS = (0.95, 1.05)


class _Case:
    """The random layers of a margin, and one with a sharp bound."""

    def __init__(self, margin: float):
        self.linears = random_layers(SIZE, margin, NUM_SEEDS)
        self.us = injections(SIZE, NUM_SEEDS)
        self.bounds = bounds(self.linears)
        sharp = sharp_layer(SIZE, margin)
        self.sharp = jtu.tree_map(lambda x: x[None], sharp), all_active(sharp)[None]
        self.forward: dict[str, Outcome] = {}
        self.peaceman: dict[float, Outcome] = {}

    def run(self) -> None:
        kind, random = eqlx.nn.ForwardBackward, (self.linears, self.us)
        for factor in FACTORS:
            outcome = solve(kind, *random, jnp.asarray(factor * self.bounds))
            self.forward[f"random, {factor} of 2 m / L^2"] = outcome
        below = self.forward[f"random, {FACTORS[0]} of 2 m / L^2"]
        self.limits = limits(self.linears, below.z)
        for factor in FACTORS:
            outcome = solve(kind, *random, jnp.asarray(factor * self.limits))
            self.forward[f"random, {factor} of the limit"] = outcome
            alpha = jnp.asarray(factor * bounds(self.sharp[0]))
            outcome = solve(kind, *self.sharp, alpha)
            self.forward[f"constructed, {factor} of 2 m / L^2"] = outcome
        for alpha in ALPHAS:
            alphas = jnp.full(NUM_SEEDS, alpha)
            self.peaceman[alpha] = solve(eqlx.nn.PeacemanRachford, *random, alphas)

    def errors(self) -> tuple[float, float]:
        """Of all runs on the random layers that should converge."""
        names = [f"random, {factor} of 2 m / L^2" for factor in FACTORS]
        runs = [self.forward[name] for name in names] + [*self.peaceman.values()]
        found = [worst(run, self.linears, self.us) for run in runs]
        value, gradient = np.max(found, axis=0)
        return float(value), float(gradient)


def _count(outcome: Outcome) -> str:
    return f"{int(np.sum(outcome.is_solved))} of {len(outcome.z)}"


def _spread(steps) -> str:
    steps = np.asarray(steps)
    return f"{np.median(steps):.0f} ({np.min(steps):.0f} to {np.max(steps):.0f})"


def _claims(margin: float, case: _Case) -> list[Claim]:
    at = lambda what, factor: f"{what}, {factor} of 2 m / L^2"
    below, above = FACTORS
    ratios = case.limits / case.bounds
    # Where an alpha is above the limit, the solve ends in an error: it is the status.
    lost = ~np.asarray(case.forward[at("constructed", above)].is_solved)
    safe = case.forward[at("random", below)], case.forward[at("constructed", below)]
    converged = [bool(np.all(run.is_solved & run.is_back_solved)) for run in safe]
    all_alphas = [
        bool(np.all(run.is_solved & run.is_back_solved))
        for run in case.peaceman.values()
    ]
    value, gradient = case.errors()
    wide = f"{_count(case.forward[at('random', above)])} random ones still converge"
    prefix = f"m = {margin:g}: "
    return [
        Claim(
            f"{prefix}forward-backward, 5% below 2 m / L^2",
            "converges",
            f"{_count(safe[0])} random, and the constructed",
            all(converged),
            "forward and backward",
        ),
        Claim(
            f"{prefix}5% above, the constructed layer",
            "no promise",
            "does not converge" if lost.all() else "converges",
            bool(lost.all()),
            f"the bound cannot be raised; {wide}",
        ),
        Claim(
            f"{prefix}where it stops converging, in units of 2 m / L^2, random",
            "not below 1",
            _spread_of(ratios),
            bool(np.min(ratios) >= 1),
            "from the eigenvalues at the equilibrium; 5% below "
            + _count(case.forward[f"random, {below} of the limit"])
            + ", 5% above "
            + _count(case.forward[f"random, {above} of the limit"]),
        ),
        Claim(
            f"{prefix}Peaceman-Rachford, alpha {ALPHAS[0]:g} to {ALPHAS[-1]:g}",
            "converges",
            f"at {sum(all_alphas)} of {len(ALPHAS)}, all seeds",
            all(all_alphas),
            "forward and backward",
        ),
        Claim(
            f"{prefix}the same equilibrium: largest difference from a dense solution",
            "0",
            f"{value:.0e}",
            value <= LIMIT,
            f"both splittings, iterates solved to {TOLERANCE:g}",
        ),
        Claim(
            f"{prefix}gradient in A, B and u: largest difference from a dense inverse",
            "0",
            f"{gradient:.0e}",
            gradient <= LIMIT,
            "relative; the adjoint by the same splitting",
        ),
    ]


def _spread_of(ratios: np.ndarray) -> str:
    low, high = np.min(ratios), np.max(ratios)
    return f"{np.median(ratios):.1f} ({low:.1f} to {high:.1f})"


def run(plots: Path | None) -> Report:
    cases = {margin: _Case(margin) for margin in MARGINS}
    for case in tqdm(cases.values(), desc="monotone", leave=False):
        case.run()
    head = ["m", "splitting", "alpha", "converge", "steps", "backward steps"]
    table, claims = [head], []
    for margin, case in cases.items():
        claims += _claims(margin, case)
        rows = [("forward-backward", *item) for item in case.forward.items()]
        for alpha, outcome in case.peaceman.items():
            rows.append(("Peaceman-Rachford", f"{alpha:.3g}", outcome))
        for kind, name, out in rows:
            is_good = bool(np.all(out.is_solved))
            steps = _spread(out.steps) if is_good else "-"
            back = _spread(out.back_steps) if is_good else "-"
            table.append([f"{margin:g}", kind, name, _count(out), steps, back])
    if plots is not None:
        _plot(plots / "monotone_splitting.png", cases)
    inputs = (
        f"{SIZE} units, ReLU, the initial A and B of `MonotoneLinear`, N(0, 1/(4 n)), "
        f"an injection N(0, 1), JAX's seeds 0 to {NUM_SEEDS - 1}, float64, from zero, "
        f"the iterates to {TOLERANCE:g} in the maximum norm. The constructed layer has "
        "A = 0 and B - B^T of rotations by a right angle, and the equilibrium one."
    )
    source = "Winston and Kolter 2020, section 3"
    return Report(source, inputs, claims, {"Steps, median and range of seeds": table})


def _plot(path: Path, cases: dict[float, _Case]) -> None:
    figure, axes = panels([f"m = {margin:g}" for margin in cases])
    for ax, case in zip(axes, cases.values(), strict=True):
        for colour, name in zip(COLOURS, ("steps", "back_steps"), strict=False):
            steps = np.array([getattr(o, name) for o in case.peaceman.values()])
            label = {"steps": "forward", "back_steps": "backward"}[name]
            ax.plot(ALPHAS, np.median(steps, axis=1), ".-", color=colour, label=label)
            ends = np.min(steps, axis=1), np.max(steps, axis=1)
            ax.fill_between(ALPHAS, *ends, color=colour, alpha=0.2, linewidth=0)
        ax.set(xscale="log", xlabel="alpha")
    axes[0].set(ylabel="steps of Peaceman-Rachford")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main({"monotone_splitting": run}, __doc__)
