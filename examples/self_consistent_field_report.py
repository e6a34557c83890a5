"""The table, the figure and the metrics at the end of the self-consistent field."""

import json
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
from figures import BLUE, GREEN, GREY, new_figure, ORANGE, save_figure, tidy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from self_consistent_field_model import TOLERANCE
from tables import two_columns


_NAMES = ("frequency", "height", "position")
_COLOURS = (GREY, ORANGE, GREEN, BLUE)


def finish(found: dict[str, Any], curves: dict[str, np.ndarray], out: Path) -> None:
    """Print the table, write `metrics.json` and the figure.

    **Arguments:**

    - `curves`: Densities and potentials on the grid.
    """
    text = json.dumps(found, indent=1, default=_as_list)
    checkpoint.replace_file(out / "metrics.json", text.encode())
    save_figure(out / "self_consistent_field.png", _figure(found, curves))
    print(f"\n{_table(found)}\n")
    print(f"In {out}: metrics.json, self_consistent_field.png")


def _as_list(array: np.ndarray) -> list:
    """JSON has no NaN: what was not recorded is null."""
    return [x if np.all(np.isfinite(x)) else None for x in array.tolist()]


def _error(got: np.ndarray, expected: np.ndarray) -> str:
    return f"{np.max(np.abs(got / expected - 1)):.0e}"


def _table(found: dict[str, Any]) -> str:
    rows = {
        "levels without repulsion": f"1/2 and 3/2 but for {found['level_error']:.0e}",
        "electrons": f"{found['electrons']:.10f}",
        "energy": f"{found['energy']:.8f}",
    }
    for name, m in found["mixings"].items():
        last = m["trace"][np.isfinite(m["trace"])][-1]
        is_solved = m["is_solved"]
        end = "" if is_solved else f"  (not solved: a residual of {last:.1g})"
        rows[f"steps, {name}"] = f"{m['steps']}{end}"
    for observable, ways in found["derivatives"].items():
        implicit = ways["implicit"]
        line = "  ".join(f"{x:.6f}" for x in implicit)
        rows[f"derivatives of the {observable}"] = line
        for way, values in ways.items():
            if way != "implicit":
                rows[f"  {observable}, against {way}"] = _error(implicit, values)
    history = found["history"]
    rows["loss of the fit"] = f"{history['loss'][0]:.2g} to {history['loss'][-1]:.1e}"
    trios = zip(_NAMES, history["trap"][-1], found["true"], strict=True)
    for name, got, true in trios:
        rows[f"  {name}"] = f"{got:.9f}  (true: {true:g})"
    solves = history["steps"]
    rows["  steps of the fit"] = f"{len(solves)}"
    rows["  steps a solve"] = f"{solves[0]:.0f} to {solves[-1]:.0f}"
    rows["  failed solves"] = f"{np.sum(history['is_solved'] == 0)}"
    return two_columns(rows)


def _figure(found: dict[str, Any], curves: dict[str, np.ndarray]) -> Figure:
    figure, axes = new_figure(2, 2)
    density, potential, residual, fit = axes.flat
    x = curves["grid"]
    density.plot(
        x, curves["alone"], color=GREY, label="without repulsion", marker=".", ms=3
    )
    density.plot(
        x, curves["density"], color=BLUE, label="self-consistent", marker=".", ms=3
    )
    density.set(title="Density of four electrons", xlabel="place", xlim=(-6, 6))
    potential.plot(x, curves["trap"], color=GREY, label="trap", marker=".", ms=3)
    potential.plot(
        x, curves["field"], color=ORANGE, label="of the electrons", marker=".", ms=3
    )
    both = curves["trap"] + curves["field"]
    potential.plot(x, both, color=BLUE, label="both", marker=".", ms=3)
    potential.set(title="Potential", xlabel="place", xlim=(-6, 6), ylim=(0, 20))
    for colour, (name, m) in zip(_COLOURS, found["mixings"].items(), strict=True):
        residual.semilogy(m["trace"], color=colour, label=name)
    residual.axhline(TOLERANCE, color="k", lw=0.8, ls="--")
    residual.set(
        title="Residual of the density", xlabel="step", ylim=(TOLERANCE / 10, 1e6)
    )
    history = found["history"]
    for i, (colour, name) in enumerate(zip((BLUE, ORANGE, GREEN), _NAMES, strict=True)):
        fit.plot(history["trap"][:, i], color=colour, label=name)
        fit.axhline(found["true"][i], color=colour, lw=0.8, ls="--")
    fit.set(title="Fit of the trap to a density", xlabel="step of L-BFGS")
    fit.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes.flat:
        tidy(ax)
    return figure
