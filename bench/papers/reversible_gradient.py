"""The gradient of a reversible solve, by dtype, weight and steps.

    python -m bench.papers.reversible_gradient [--json FILE]

McCallum, Arora and Foster 2025, arXiv 2509.12917: undoing the steps gives the gradient
exactly but for rounding errors, which undoing amplifies. A step of theirs moves both of
a pair of states, and is two of ours.
"""

from pathlib import Path

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from tqdm import tqdm

from ..reversible import cell, gradient_error, SIZE
from .report import Claim, main, Report


BETAS = (0.5, 0.8, 0.9)
GAINS = (0.5, 0.9)
STEPS = (4, 12, 24)
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float64)
# At a weight of 0.8 and 12 steps of theirs.
MEASURED = {"bfloat16": 5e-2, "float32": 2e-4, "float64": 9e-12}


def growth(beta: float, num_steps: int = 30) -> tuple[float, float]:
    """By how much the error of a state grows with each of their steps, and should.

    The first is measured in float64, as a geometric mean until an error of 1e-3. The
    second follows from the Jacobian at the end: with eigenvalues `l`, errors on the way
    back follow the roots of `(1 - beta) s^2 + beta l s - 1`, the largest of which
    counts. It is at most `1 / (1 - beta)`, for an `l` of one or minus one.
    """
    keys = jr.split(jr.key(0), 2)
    w = jr.normal(keys[0], (SIZE, SIZE), jnp.float64)
    args = (0.9 * w / jnp.linalg.norm(w, 2), jr.normal(keys[1], (SIZE,), jnp.float64))
    solver = eqlx.Reversible(0.0, 0.0, beta=beta)

    def forward(pair, _):
        old, y = pair
        new = (y, (1 - beta) * old + beta * cell(y, args))
        return new, new[1]

    def back(pair, expected):
        y, new = pair
        old = solver.reverse(cell(y, args), new)
        return (old, y), jnp.max(jnp.abs(old - expected))

    @jax.jit
    def errors():
        start = jnp.zeros(SIZE)
        end, ys = lax.scan(forward, (start, start), None, length=2 * num_steps)
        found = lax.scan(back, end, ys[:-2], reverse=True)[1][::-1]
        return found, jax.jacfwd(cell)(end[1], args)

    found, jacobian = errors()
    first, last = 3, int(np.argmax(np.append(found >= 1e-3, True)))
    measured = (found[last - 1] / found[first]) ** (2 / (last - 1 - first))
    roots = [
        np.roots([1 - beta, beta * value, -1])
        for value in np.linalg.eigvals(np.asarray(jacobian))
    ]
    return float(measured), float(np.max(np.abs(roots)) ** 2)


def run(plots: Path | None) -> Report:
    del plots
    cases = [(gain, beta) for gain in GAINS for beta in BETAS]
    gains, betas = jnp.array(cases).T
    head = [f"{d.dtype.name}, {num} steps" for d in DTYPES for num in STEPS]
    table = [["gain", "beta", *head]]
    table += [[f"{gain}", f"{beta}"] for gain, beta in cases]
    found = {}
    jobs = [(dtype, num) for dtype in DTYPES for num in STEPS]
    for dtype, num in tqdm(jobs, desc="reversible", leave=False):
        one = lambda gain, beta: gradient_error(gain, beta, dtype, 2 * num)  # noqa: B023
        errors, estimates, undone = jax.jit(jax.vmap(one))(gains, betas)
        name = dtype.dtype.name
        for i, case in enumerate(cases):
            found[name, num, *case] = float(errors[i])
            cell_text = f"{errors[i]:.0e} ({estimates[i]:.0e}, {int(undone[i])})"
            table[1 + i].append(cell_text)
    claims = []
    for name, published in MEASURED.items():
        low, high = (found[name, 12, gain, 0.8] for gain in GAINS)
        claims.append(
            Claim(
                f"error of the gradient, beta 0.8, 12 steps, {name}",
                f"{published:.0e}",
                f"{low:.0e} and {high:.0e}",
                published / 3 <= high <= 3 * published,
                "at gains of 0.5 and 0.9; met is within three times at 0.9",
            )
        )
    for beta in BETAS:
        ours, expected = growth(beta)
        claims.append(
            Claim(
                f"growth of a state's error a step, beta {beta}",
                f"at most {(1 - beta) ** -2:.0f}",
                f"{ours:.1f}",
                ours <= (1 - beta) ** -2,
                f"{expected:.1f} by the eigenvalues of this Jacobian, and all of it "
                "for one of 1 or -1",
            )
        )
    inputs = (
        f"A tanh cell of width {SIZE} with a weight of spectral norm 0.5 or 0.9, "
        "inputs N(0, 1), from zero, JAX's seed 0. The error is that of the gradient "
        "in the weight, relative to its largest number, from backpropagation."
    )
    title = (
        "Errors; in brackets the adjoint's own estimate and how many of twice the "
        "steps it undid before the states were lost"
    )
    source = "McCallum, Arora and Foster 2025; the errors measured elsewhere"
    return Report(source, inputs, claims, {title: table})


if __name__ == "__main__":
    main({"reversible_gradient": run}, __doc__)
