"""What a gradient costs, and how good it is: truncated, shared and solved.

    python -m bench.papers.gradient_quality [--plots FOLDER] [--json FILE]

The chart of Ramzi et al. 2022 (SHINE) in shape: each way to the gradient by the
products with the transposed Jacobian that it takes, on a tanh layer from an easy gain
to a hard one.
"""

import dataclasses
from pathlib import Path
from typing import Any

import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..gradient_cell import cell, INPUT_SCALE, WEIGHTS
from .plots import COLOURS, panels, save
from .report import Claim, main, Report


SIZE, BATCH = 64, 16
GAINS = (0.5, 0.8, 0.95, 0.99)
SPECTRA = ("symmetric", "orthogonal")
TOLERANCES = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
FORWARD = 1e-10
# Relative errors of the gradient in the weight, by gain.
MEASURED = {
    "one step": ("0.46", "0.66", "0.70", "0.70"),
    "SHINE": ("0.28", "0.45", "0.52", "0.62"),
    "Neumann(10)": ("0.0005", "0.032", "0.13", "0.18"),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to the gradient, from the tolerance of its linear solve if it has one."""

    family: str
    adjoint: Any
    is_truncated: bool = True


def _implicit(solver):
    return Method("truncated", lambda _: eqlx.ImplicitAdjoint(solver))


def _phantom(num: int):
    solver = eqlx.Neumann(num, damp=0.5)
    return Method("phantom", lambda _: eqlx.ImplicitAdjoint(solver))


def _shared(num: int, growth: float | None = None):
    return Method(
        "SHINE", lambda _: eqlx.SharedInverseAdjoint(eqlx.Neumann(num), growth)
    )


def _solved(family: str, make):
    return Method(family, lambda rtol: eqlx.ImplicitAdjoint(make(rtol)), False)


METHODS = {
    "one step": _implicit(eqlx.Neumann(0)),
    "Neumann(1)": _implicit(eqlx.Neumann(1)),
    "Neumann(5)": _implicit(eqlx.Neumann(5)),
    "Neumann(10)": _implicit(eqlx.Neumann(10)),
    "phantom(5)": _phantom(5),
    "phantom(10)": _phantom(10),
    "SHINE": _shared(0),
    "SHINE, no fallback": _shared(0, float("inf")),
    "SHINE, refined(1)": _shared(1),
    "SHINE, refined(5)": _shared(5),
    "implicit, Anderson": _solved(
        "implicit, Anderson",
        lambda rtol: eqlx.FixedPointLinearSolver(eqlx.Anderson(0.0, rtol)),
    ),
    "implicit, Krylov": _solved(
        "implicit, Krylov", lambda rtol: eqlx.KrylovLinearSolver(rtol)
    ),
}


def make(gain: float, spectrum: str, *, is_aligned: bool) -> tuple[np.ndarray, ...]:
    """The weight, inputs, solutions, cotangents, and the gradient by dense solves.

    **Arguments:**

    - `is_aligned`: Whether the cotangents are the solutions, those of a loss of half
        of their squares, and not random.
    """
    rng = np.random.default_rng(0)
    w = WEIGHTS[spectrum](rng.normal(size=(SIZE, SIZE)))
    w = gain * w / np.linalg.norm(w, ord=2)
    xs = INPUT_SCALE * rng.normal(size=(BATCH, SIZE))
    zs = np.zeros_like(xs)
    for _ in range(5000):
        zs = np.tanh(zs @ w.T + xs)
    cts = zs if is_aligned else rng.normal(size=(BATCH, SIZE))
    slopes = 1 - zs**2
    systems = np.eye(SIZE) - np.swapaxes(slopes[..., None] * w, 1, 2)
    u = slopes * np.linalg.solve(systems, cts[..., None])[..., 0]
    return w, xs, cts, u.T @ zs


def run_method(method: Method, w, xs, cts, rtol):
    """The gradient in the weight, and the products with the Jacobian a sample."""
    forward = eqlx.Broyden(0.0, FORWARD, history_length=20)

    def one(x, ct):
        args = (w, x)
        sol = eqlx.fixed_point(
            cell, forward, jnp.zeros_like(x), args, max_steps=2000, throw=False
        )
        u = eqlx.solve_adjoint(
            cell,
            forward,
            sol.value,
            ct,
            args,
            adjoint=method.adjoint(rtol),
            state=sol.state,
            throw=False,
        )
        pull = jax.vjp(lambda w: cell(sol.value, (w, x)), w)[1]
        # A truncated solve leaves out the product that its residual takes.
        num = "num_steps" if method.is_truncated else "num_fn_evals"
        return pull(u.value)[0], u.stats[num]

    grads, nums = jax.vmap(one)(xs, cts)
    return jnp.sum(grads, axis=0), jnp.mean(nums.astype(jnp.float64))


def quality(got: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """The relative error in the Frobenius norm, and the cosine."""
    size = np.linalg.norm(true)
    cosine = np.sum(got * true) / (np.linalg.norm(got) * size)
    return float(np.linalg.norm(got - true) / size), float(cosine)


Found = dict[tuple[str, bool, float], dict[str, list[tuple[float, float, float]]]]


def measure() -> Found:
    """By spectrum, alignment, gain and method: products, error and cosine."""
    keys = [(s, a, g) for s in SPECTRA for a in (False, True) for g in GAINS]
    cases = {(s, a, g): make(g, s, is_aligned=a) for s, a, g in keys}
    found: Found = {key: {} for key in cases}
    for name, method in tqdm(METHODS.items(), desc="gradients", leave=False):
        run = jax.jit(lambda *args, m=method: run_method(m, *args))
        for key, (w, xs, cts, true) in cases.items():
            points = []
            for rtol in TOLERANCES if not method.is_truncated else (1.0,):
                grad, num = run(w, xs, cts, rtol)
                points.append((float(num), *quality(np.asarray(grad), true)))
            found[key][name] = points
    return found


def _row(name: str, found: Found, spectrum: str, is_aligned: bool, which: int):
    points = [found[spectrum, is_aligned, g][name][which] for g in GAINS]
    return [f"{error:.1e} / {cosine:.3f} / {num:.1f}" for num, error, cosine in points]


def _tables(found: Found) -> dict[str, list[list[str]]]:
    tables = {}
    for spectrum in SPECTRA:
        for is_aligned in (False, True):
            kind = "aligned" if is_aligned else "random"
            rows = [["method", *(f"gain {g}" for g in GAINS)]]
            for name, method in METHODS.items():
                if method.is_truncated:
                    cells = _row(name, found, spectrum, is_aligned, 0)
                    rows.append([name, *cells])
                    continue
                for i, rtol in enumerate(TOLERANCES):
                    cells = _row(name, found, spectrum, is_aligned, i)
                    rows.append([f"{name}, {rtol:.0e}", *cells])
            title = f"Error / cosine / products: {spectrum} weight, {kind} cotangent"
            tables[title] = rows
    return tables


def run(plots: Path | None) -> Report:
    found = measure()
    if plots is not None:
        _plot(plots / "gradient_quality.png", found)
    claims = []
    cases = [(name, spectrum, False) for name in MEASURED for spectrum in SPECTRA]
    cases += [("SHINE", spectrum, True) for spectrum in SPECTRA]
    for name, spectrum, is_aligned in cases:
        errors = [found[spectrum, is_aligned, g][name][0][1] for g in GAINS]
        claims.append(
            Claim(
                f"error, {name}, {spectrum} weight" + is_aligned * ", aligned",
                ", ".join(MEASURED[name]),
                ", ".join(f"{e:.2g}" for e in errors),
                None,
                "the weight and the cotangent that they had aren't known",
            )
        )
    inputs = (
        f"z = tanh(W z + x), {SIZE} unknowns, {BATCH} samples, x of size "
        f"{INPUT_SCALE}, W with a 2-norm of the gain, float64, forward "
        f"by Broyden(20) to {FORWARD:g}; NumPy's seed 0. Cotangents are random, or "
        "aligned: the solutions. Phantom: damped by half."
    )
    source = "Ramzi et al. 2022 in shape; the errors measured elsewhere"
    return Report(source, inputs, claims, _tables(found))


def _plot(path: Path, found: Found) -> None:
    figure, axes = panels([f"gain {gain}" for gain in GAINS])
    families = list(dict.fromkeys(m.family for m in METHODS.values()))
    for ax, gain in zip(axes, GAINS, strict=True):
        for colour, family in zip(COLOURS, families, strict=False):
            names = [n for n, m in METHODS.items() if m.family == family]
            entries = found["orthogonal", False, gain]
            points = sorted(p for name in names for p in entries[name])
            nums, errors, _ = zip(*points, strict=True)
            ax.plot(nums, errors, "o-", color=colour, markersize=4, label=family)
        ax.set(xscale="symlog", xlabel="products with the Jacobian", xlim=(-0.2, None))
    axes[0].set(ylabel="relative error of dW")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    main({"gradient_quality": run}, __doc__)
