"""The slope of equilibrium layers, and the bound that they promise.

    python -m bench.papers.lipschitz_bounds [--plots FOLDER] [--json FILE]

Revay, Wang and Manchester 2020: the output of their layer moves by at most `gamma`
times what the input moves by. Pabbaraju, Winston and Kolter 2021: the equilibrium of a
monotone operator network moves by at most `||U|| / m` times that. With `u = U x` and
`dz`, `du` between two of them it is short: the proximal operator is firmly
non-expansive, so `0 <= <dz, du - (I - W) dz>`, and `m |dz|^2 <= <dz, (I - W) dz> <=
|dz| |du|`.

The slope is looked for in random pairs, in pairs that climb by its gradient, and in the
singular values of the Jacobian, before and after a training whose loss is the slope.
"""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import lipschitz_slopes as slopes
from .plots import COLOURS, panels, save
from .report import Claim, main, Report


GAMMAS, MARGINS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0), (0.1, 0.5, 1.0, 2.0)
# Of the slopes, for solves to 1e-10 at a distance of 0.01.
SLACK = 1e-6
_KINDS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "gamma": (slopes.bounded, GAMMAS),
    "m": (slopes.monotone, MARGINS),
}
_TIMES = ("initial", "trained")
Found = dict[tuple[str, float], dict[str, dict[str, np.ndarray]]]


def measure_all() -> Found:
    """By parameter and value, then by time, then by the way a slope was found."""
    found: Found = {}
    cases = [(n, make, v) for n, (make, vs) in _KINDS.items() for v in vs]
    for name, make, value in tqdm(cases, desc="Lipschitz", leave=False):
        layers = make(value)
        initial = slopes.measure(layers)
        trained = slopes.measure(slopes.train(layers))
        found[name, value] = dict(zip(_TIMES, (initial, trained), strict=True))
    return found


def _largest(ways: dict[str, np.ndarray]) -> np.ndarray:
    """Of each seed."""
    return np.max(list(ways.values()), axis=0)


def _claims(found: Found) -> list[Claim]:
    claims = []
    for name, what in (
        ("gamma", "`LipschitzBoundedLayer`, its bound gamma"),
        ("m", "`MonotoneLayer`, its bound norm of U / m"),
    ):
        values = _KINDS[name][1]
        for time in _TIMES:
            largest = [_largest(found[name, value][time]) for value in values]
            low, high = np.min(largest), np.max(largest)
            published = "at most 1"
            claims.append(
                Claim(
                    f"{what}, {time}: largest slope, divided by it",
                    published,
                    f"{low:.3f} to {high:.3f}",
                    bool(high <= 1 + SLACK),
                    f"{name} {values[0]:g} to {values[-1]:g}, all seeds",
                )
            )
    return claims


def run(plots: Path | None) -> Report:
    found = measure_all()
    ways = list(next(iter(found.values()))["initial"])
    table = [["layer", *(f"{time}, {way}" for time in _TIMES for way in ways)]]
    for (name, value), times in found.items():
        cells = [times[time][way] for time in _TIMES for way in ways]
        table.append([f"{name} {value:g}", *(f"{np.max(c):.3f}" for c in cells)])
    if plots is not None:
        _plot(plots / "lipschitz_bounds.png", found)
    inputs = (
        f"{slopes.INPUTS} inputs, {slopes.UNITS} ReLU units, {slopes.OUTPUTS} outputs "
        "(the monotone layer's are its units), the initial parameters of the library, "
        f"Peaceman-Rachford to 1e-10, float64, JAX's seeds 0 to {slopes.NUM_SEEDS - 1}."
        f" {slopes.NUM_PAIRS} points N(0, 1) and steps from them in random directions, "
        "of lengths of 0.01 to 10, uniform in the logarithm; the "
        f"{slopes.NUM_CLIMBERS} steepest of these climb by 100 steps of Adam at a "
        f"distance of {slopes.DISTANCE}; the Jacobian is that at the points, from a "
        f"dense inverse in NumPy. Training: {slopes.NUM_STEPS} steps of Adam "
        f"{slopes.RATE:g} on the mean logarithm of the slope over the bound, 16 new "
        "pairs a step."
    )
    source = "Revay et al. 2020, theorem 2; Pabbaraju et al. 2021"
    title = "Largest slope divided by the bound, largest of the seeds"
    return Report(source, inputs, _claims(found), {title: table})


def _plot(path: Path, found: Found) -> None:
    figure, axes = panels(["Lipschitz-bounded", "monotone"], share=False)
    for ax, (name, (_, values)) in zip(axes, _KINDS.items(), strict=True):
        bounds = np.array(values) if name == "gamma" else 1 / np.array(values)
        ax.plot(values, bounds, color="#444444", linewidth=0.8, label="bound")
        for colour, time in zip(COLOURS, _TIMES, strict=False):
            largest = np.array([_largest(found[name, v][time]) for v in values])
            for i, seed in enumerate(largest.T):
                label = time if i == 0 else None
                ax.plot(values, bounds * seed, ".", color=colour, label=label)
        ax.set(xscale="log", xlabel=name)
    axes[0].set(ylabel="largest slope")
    axes[1].set(ylabel="largest slope / norm of U")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main({"lipschitz_bounds": run}, __doc__)
