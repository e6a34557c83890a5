"""Steps and time of the splittings of a monotone layer.

    python -m bench.monotone

Two tables, all from zero and to the same absolute tolerance. In the first each has the
length of step that its bound prefers, m / L^2 or 1 / L, and runs plain and accelerated
by Anderson's method, forward and backward. In the second are the steps of the plain
iteration for multiples of that length, at the smallest margin.
"""

import argparse
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .timing import compare, describe


_MAX_STEPS = 100_000
_activations = {"relu": jax.nn.relu, "tanh": jnp.tanh}
_splittings = {
    "forward-backward": eqlx.nn.ForwardBackward(),
    "Peaceman-Rachford": eqlx.nn.PeacemanRachford(),
    "Peaceman-Rachford, alpha=1": eqlx.nn.PeacemanRachford(1.0),
}


def _solvers(tolerance: float):
    return {
        "iteration": eqlx.FixedPointIteration(0.0, tolerance),
        "Anderson(5)": eqlx.Anderson(0.0, tolerance),
    }


def _layer(options, margin, splitting, solver, activation):
    w_key, u_key = jr.split(jr.key(options.seed))
    linear_solver = eqlx.FixedPointLinearSolver(solver, max_steps=_MAX_STEPS)
    return eqlx.nn.MonotoneLayer(
        eqlx.nn.MonotoneLinear(options.size, margin, key=w_key),
        eqx.nn.Linear(options.size, options.size, key=u_key),
        splitting,
        solver,
        activation=activation,
        adjoint=eqlx.ImplicitAdjoint(linear_solver),
        max_steps=_MAX_STEPS,
    )


def _programs(layer):
    """The solve alone, and the gradient with the steps of its backward pass."""

    @eqx.filter_jit
    def forward(layer, xs):
        return jax.vmap(layer.solve)(xs)

    @eqx.filter_jit
    def backward(layer, xs):
        def total(both):
            layer, monitor = both
            run = lambda x, monitor: layer(x, monitor=monitor)
            return jnp.sum(jax.vmap(run, (0, None))(xs, monitor))

        return eqx.filter_grad(total)((layer, eqlx.AdjointMonitor()))

    return forward, backward


def _row(options, xs, margin, name, splitting, solver_name, solver, activation) -> str:
    layer = _layer(options, margin, splitting, solver, activation)
    forward, backward = _programs(layer)
    sol, (_, monitor) = forward(layer, xs), backward(layer, xs)
    steps: Any = np.asarray(sol.stats["num_steps"])
    is_good = bool(np.all(sol.result == eqlx.RESULTS.successful))
    back = float(monitor.num_steps) / len(xs)
    times = compare(
        {
            "forward": lambda: forward(layer, xs),
            "both": lambda: backward(layer, xs),
        },
        repeats=options.repeats,
        title=name,
    )
    failed = f" ({int(monitor.num_failed)} failed)" if monitor.num_failed > 0 else ""
    return (
        f"| {margin} | {activation.__name__} | {name} | {solver_name} | "
        f"{steps.mean():.0f}{'' if is_good else ' (not all converged)'} | "
        f"{back:.0f}{failed} | {times['forward']:.1f} | {times['both']:.1f} |"
    )


def _scan(options, xs, margin):
    """The steps for several lengths of step, as a table."""
    solver = eqlx.FixedPointIteration(0.0, options.tolerance)
    factors = 2.0 ** np.arange(-3, 7)
    print("| margin | splitting | " + " | ".join(f"x {f:g}" for f in factors) + " |")
    print("|---" * (2 + len(factors)) + "|")
    for kind in (eqlx.nn.ForwardBackward, eqlx.nn.PeacemanRachford):
        layer = _layer(options, margin, kind(), solver, jax.nn.relu)
        norm = layer.linear.prepare((options.size,)).norm()
        is_forward = kind is eqlx.nn.ForwardBackward
        best = margin / norm**2 if is_forward else 1 / norm

        @eqx.filter_jit
        def solve(alpha, layer=layer, kind=kind):
            this = eqx.tree_at(lambda la: la.how.splitting, layer, kind(alpha))
            return jax.vmap(this.solve)(xs)

        cells = []
        for factor in factors:
            sol = solve(factor * best)
            is_good = bool(np.all(sol.result == eqlx.RESULTS.successful))
            mean = float(jnp.mean(sol.stats["num_steps"]))
            cells.append(f"{mean:.0f}" if is_good else "fails")
        print(f"| {margin} | {kind.__name__} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="unknowns of a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument("--margins", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--activations", nargs="+", default=["relu"])
    parser.add_argument("--tolerance", type=float, default=1e-8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    xs = jr.normal(jr.key(options.seed + 1), (options.batch, options.size))
    print(f"{describe()}; {options.batch} samples of {options.size} unknowns, float64")
    print(
        "| margin | activation | splitting | solver | steps | backward steps | "
        "forward, ms | forward and backward, ms |\n|---|---|---|---|---|---|---|---|"
    )
    for margin in options.margins:
        for activation in options.activations:
            for name, splitting in _splittings.items():
                for solver_name, solver in _solvers(options.tolerance).items():
                    case = (name, splitting, solver_name, solver)
                    fn = _activations[activation]
                    print(_row(options, xs, margin, *case, fn), flush=True)
    print()
    _scan(options, xs, min(options.margins))


if __name__ == "__main__":
    main()
