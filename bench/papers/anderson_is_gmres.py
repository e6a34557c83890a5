"""Anderson acceleration is GMRES on a linear map.

    python -m bench.papers.anderson_is_gmres [--plots FOLDER] [--json FILE]

Walker and Ni 2011, SIAM J. Numer. Anal. 49, theorem 2.2: for `f(y) = A y + b`, with
all of the history kept and as long as GMRES does not stand still, the iterate `k + 1`
of Anderson is `f` of the iterate `k` of GMRES on `(I - A) y = b`, both from the same
start.
"""

from pathlib import Path
from typing import Any

import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np

from .plots import COLOURS, panels, save
from .report import Claim, main, Report


SIZE, RADIUS, NUM = 60, 0.9, 20
LIMIT = 1e-8


def gmres(matrix: np.ndarray, rhs: np.ndarray, num: int) -> list[np.ndarray]:
    """The iterates from zero, the start included, by Arnoldi's method in NumPy."""
    basis = [rhs / np.linalg.norm(rhs)]
    hessenberg = np.zeros((num + 1, num))
    found = [np.zeros_like(rhs)]
    for k in range(num):
        new = matrix @ basis[-1]
        for _ in range(2):  # Once is not orthogonal to the last digits.
            for i, vector in enumerate(basis):
                share = vector @ new
                hessenberg[i, k] += share
                new = new - share * vector
        hessenberg[k + 1, k] = np.linalg.norm(new)
        basis.append(new / hessenberg[k + 1, k])
        unit = np.linalg.norm(rhs) * np.eye(k + 2)[0]
        weights = np.linalg.lstsq(hessenberg[: k + 2, : k + 1], unit, rcond=None)[0]
        found.append(np.stack(basis[:-1], axis=1) @ weights)
    return found


def make(
    size: int, rng: np.random.Generator, *, is_symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of the spectral radius, and a vector."""
    a = rng.normal(size=(size, size))
    a = a + a.T if is_symmetric else a
    a = RADIUS * a / np.max(np.abs(np.linalg.eigvals(a)))
    return a, rng.normal(size=size)


class Iterates:
    """Runs Anderson on a linear map, and keeps the points at which it is evaluated."""

    def __init__(self, num: int):
        self.num = num
        self._seen: list[np.ndarray] = []

    def _fn(self, y, args):
        jax.debug.callback(self._see, y, ordered=True)
        a, b = args
        return a @ y + b

    def _see(self, y) -> None:
        self._seen.append(np.asarray(y))

    def __call__(self, a, b, ridge: float) -> list[np.ndarray]:
        self._seen.clear()
        solver: Any = eqlx.Anderson(
            0.0, 0.0, history_length=self.num, ridge=jnp.asarray(ridge, jnp.float64)
        )
        args = (jnp.asarray(a), jnp.asarray(b))
        sol = eqlx.fixed_point(
            self._fn, solver, jnp.zeros(len(b)), args, max_steps=self.num + 1
        )
        jax.block_until_ready(sol.value)
        jax.effects_barrier()
        return list(self._seen)


def differences(a, b, iterates: list[np.ndarray], num: int) -> list[float]:
    """Of Anderson's `k + 1` to the map of GMRES's `k`, relative, for `k` from 1."""
    images = [a @ y + b for y in gmres(np.eye(len(b)) - a, b, num)]
    pairs = zip(iterates[2:], images[1:], strict=True)
    return [float(np.linalg.norm(y - f) / np.linalg.norm(f)) for y, f in pairs]


def run(plots: Path | None) -> Report:
    rng, iterates = np.random.default_rng(0), Iterates(NUM)
    cases = {"Gaussian": False, "symmetric": True}
    found, curves, norms = {}, {}, {}
    for name, is_symmetric in cases.items():
        a, b = make(SIZE, rng, is_symmetric=is_symmetric)
        norms[name] = np.linalg.norm(a, 2)
        for ridge in (0.0, 1e-10):
            ours = iterates(a, b, ridge)
            found[name, ridge] = differences(a, b, ours, NUM)
            solution = np.linalg.solve(np.eye(SIZE) - a, b)
            curves[name, ridge] = [np.linalg.norm(y - solution) for y in ours]
    if plots is not None:
        _plot(plots / "anderson_is_gmres.png", found, curves)
    worst = {key: max(errors) for key, errors in found.items()}
    claims = [
        Claim(
            f"largest relative difference, {name} matrix, {kind}",
            f"{LIMIT:.0e}",
            f"{worst[name, ridge]:.1e}",
            worst[name, ridge] <= LIMIT,
            note,
        )
        for name in cases
        for ridge, kind, note in (
            (0.0, "`ridge=0`", ""),
            (1e-10, "the default `ridge`", "the ridge costs five digits"),
        )
    ]
    inputs = (
        f"{SIZE} unknowns, spectral radius {RADIUS} (2-norms "
        + ", ".join(f"{norm:.2f}" for norm in norms.values())
        + f"), float64, from zero, {NUM} iterations with as many differences kept; "
        "NumPy's seed 0. GMRES is Arnoldi's method in NumPy, orthogonalised twice."
    )
    return Report("Walker and Ni 2011, theorem 2.2", inputs, claims)


def _plot(path: Path, found: dict, curves: dict) -> None:
    figure, (left, right) = panels(
        ["error of Anderson's iterates", "difference from GMRES"], share=False
    )
    for colour, key in zip(COLOURS, found, strict=False):
        label = f"{key[0]}, ridge {key[1]:g}"
        left.plot(range(len(curves[key])), curves[key], color=colour, label=label)
        right.plot(range(1, NUM + 1), found[key], ".-", color=colour, label=label)
    right.axhline(LIMIT, color="#444444", linewidth=0.8, linestyle="--")
    left.set(xlabel="step", ylabel="2-norm")
    right.set(xlabel="k", ylabel="relative")
    right.legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main({"anderson_is_gmres": run}, __doc__)
