"""An equilibrium of physics: electrons in the potential that they make themselves.

    python examples/self_consistent_field.py

Their density is found by Anderson's method, which was made for this, differentiated by
the implicit function theorem, and used backwards: to find the trap that electrons of a
given density are in. The physics is in `self_consistent_field_model.py`.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import self_consistent_field_model as model
from command_line import integer, progress_bar
from self_consistent_field_report import finish


TRUE = (1.0, 3.0, 0.5)  # Frequency of the trap, height and position of its bump.
GUESS = (0.7, 1.0, -0.3)
NUM_STEPS = 40
_ENOUGH = 1e-18  # Of the loss: a density that is right to 1e-9.
_DIFFERENCE = 1e-4  # For finite differences, of which the error is its square.
MIXINGS = {
    "plain": eqlx.FixedPointIteration(0.0, model.TOLERANCE),
    "plain, damped by 0.5": eqlx.FixedPointIteration(0.0, model.TOLERANCE, damp=0.5),
    "plain, damped by 0.8": eqlx.FixedPointIteration(0.0, model.TOLERANCE, damp=0.8),
    "Anderson": model.ANDERSON,
}
_MAX_STEPS = 120


def compare_mixings(trap: model.Trap) -> dict[str, dict[str, Any]]:
    """For each of them how the residual fell, and whether to the tolerance."""
    found = {}
    for name, solver in MIXINGS.items():
        sol = model.solve(trap, solver=eqlx.Traced(solver), max_steps=_MAX_STEPS)
        found[name] = {
            "steps": int(sol.stats["num_steps"]),
            "is_solved": bool(sol.result == eqlx.RESULTS.successful),
            "trace": np.asarray(sol.stats["trace"]),
        }
    return found


def _observables(trap: model.Trap):
    density = model.solve(trap).value
    return model.total_energy(density, trap), model.extent(density)


def derivatives(trap: model.Trap) -> dict[str, dict[str, np.ndarray]]:
    """Of the energy and of the extent, by the parameters of the trap."""
    params, unravel = jax.flatten_util.ravel_pytree(trap)
    observables = lambda p: (values := jnp.stack(_observables(unravel(p))), values)
    # One program for the two, which is compiled once.
    run = eqx.filter_jit(jax.jacrev(observables, has_aux=True))
    implicit = np.asarray(run(params)[0])
    shifts = _DIFFERENCE * np.eye(len(params))
    above, below = (
        np.stack([run(params + sign * shift)[1] for shift in shifts], axis=1)
        for sign in (1, -1)
    )
    differences = (above - below) / (2 * _DIFFERENCE)
    # The derivative of the energy is that of the trap at a density that stays as it is.
    density = model.solve(trap).value
    outside = lambda p: model.STEP * jnp.sum(density * unravel(p)())
    return {
        "energy": {
            "implicit": implicit[0],
            "Hellmann-Feynman": np.asarray(jax.grad(outside)(params)),
            "finite differences": differences[0],
        },
        "extent": {"implicit": implicit[1], "finite differences": differences[1]},
    }


@eqx.filter_jit
def _fit_step(trap, density, opt_state, optimiser, target):
    def loss(trap):
        # From where the last step ended: the trap has changed by little.
        sol = model.solve(trap, density)
        return model.STEP * jnp.sum((sol.value - target) ** 2), sol

    (value, sol), grads = jax.value_and_grad(loss, has_aux=True)(trap)
    # The line search tries traps, and needs no gradients there.
    value_fn = lambda trap: loss(trap)[0]
    updates, opt_state = optimiser.update(
        grads, opt_state, trap, value=value, grad=grads, value_fn=value_fn
    )
    figures = {
        "loss": value,
        "steps": sol.stats["num_steps"],
        "is_solved": sol.result == eqlx.RESULTS.successful,
    }
    return eqx.apply_updates(trap, updates), sol.value, opt_state, figures


def fit(target, num_steps: int) -> dict[str, np.ndarray]:
    """Find the trap whose electrons have the density `target`, by L-BFGS.

    **Returns:**

    For each step the loss, the trap and more.
    """
    trap = model.trap(*GUESS)
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    optimiser = optax.lbfgs(linesearch=search)
    opt_state = optimiser.init(eqx.filter(trap, eqx.is_inexact_array))
    density = model.start(trap)
    rows: list[dict[str, Any]] = []
    with progress_bar(num_steps, 0) as bar:
        while len(rows) < num_steps and not (rows and rows[-1]["loss"] < _ENOUGH):
            params = [float(x) for x in jax.tree.leaves(trap)]
            trap, density, opt_state, figures = _fit_step(
                trap, density, opt_state, optimiser, target
            )
            rows.append({**{k: float(v) for k, v in figures.items()}, "trap": params})
            text = f"step {len(rows)}, loss {rows[-1]['loss']:.1e}"
            bar.set_description_str(text, refresh=False)
            bar.update()
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def run_all(args: argparse.Namespace) -> None:
    jax.config.update("jax_enable_x64", True)
    trap = model.trap(*TRUE)
    parabola = 0.5 * model.grid() ** 2
    levels = np.asarray(model.states(parabola)[0])
    density = model.solve(trap).value
    finish(
        {
            "level_error": float(np.max(np.abs(levels - [0.5, 1.5]))),
            "energy": float(model.total_energy(density, trap)),
            "electrons": float(model.STEP * jnp.sum(density)),
            "mixings": compare_mixings(trap),
            "derivatives": derivatives(trap),
            "true": list(TRUE),
            "history": fit(density, args.steps),
        },
        {
            "grid": np.asarray(model.grid()),
            "trap": np.asarray(trap()),
            "field": np.asarray(model.mean_field(density)),
            "density": np.asarray(density),
            "alone": np.asarray(model.start(trap)),
        },
        args.out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A self-consistent field.")
    add = parser.add_argument
    add("--steps", type=integer(1, 9999), help=f"of the fit, at most [{NUM_STEPS}]")
    out = Path("runs/self_consistent_field")
    add("--out", type=Path, default=out, help=f"folder for the files [{out}]")
    add("--quick", action="store_true", help="five steps of the fit")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = 5 if args.quick else NUM_STEPS
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        run_all(args)
    except KeyboardInterrupt:  # There is nothing to go on from.
        sys.exit(128 + signal.SIGINT)
    except OSError as error:  # A full disk, a folder that cannot be written to.
        sys.exit(f"self_consistent_field.py: error: {error}")


if __name__ == "__main__":
    main()
