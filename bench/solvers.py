"""What solvers need, ours and others', on problems with known answers.

    python -m bench.solvers

Two tables. In the first are the evaluations of `fn` up to the first at a point whose
true error is below a target, whatever the solver's own rule of stopping would have
been: an equal accuracy for all. SciPy comes with the extra `examples`; JAXopt is left
out where it is missing. In the second are whole solves, to a tolerance that implies the
target: their evaluations, products with the Jacobian included, time, error and status.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import equilax as eqlx
import jax
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from tests import problems
from tqdm import tqdm

from .timing import compare, describe


MAX_STEPS = 3000
TARGET = 1e-8

_counted = {
    "iteration": eqlx.FixedPointIteration(0.0, 0.0),
    "Anderson(5)": eqlx.Anderson(0.0, 0.0),
    "Anderson(10)": eqlx.Anderson(0.0, 0.0, history_length=10),
    "alternating(5)": eqlx.AlternatingAnderson(0.0, 0.0),
    "type I(5)": eqlx.AndersonTypeI(0.0, 0.0),
    "Broyden(10)": eqlx.Broyden(0.0, 0.0),
    "Broyden(30)": eqlx.Broyden(0.0, 0.0, history_length=30),
    "bad Broyden(10)": eqlx.BadBroyden(0.0, 0.0),
    "Squarem": eqlx.Squarem(0.0, 0.0),
    "Aitken": eqlx.Aitken(0.0, 0.0),
}
_timed = {
    **_counted,
    "Reversible": eqlx.Reversible(0.0, 0.0),
    "Newton": eqlx.Newton(0.0, 0.0),
    "Newton-Krylov": eqlx.NewtonKrylov(0.0, 0.0),
    "Auto": eqlx.Auto(0.0, 0.0),
}
_RESULTS = ("max_steps_reached", "stagnation", "divergence", "nonfinite")


class _Reached(Exception):
    """Ends a solve of SciPy's, which takes no other rule of stopping than its own."""


def _target(problem: problems.Problem) -> float:
    return max(TARGET, 10 * problem.rounding)


class _Recorder:
    """Counts evaluations until one is at a point near enough to the solution."""

    def __init__(self, problem: problems.Problem):
        self.problem = problem
        self.num = 0
        self.reached: int | None = None

    def __call__(self, value):
        self.num += 1
        error = problems.error(self.problem, value)
        if self.reached is None and error < _target(self.problem):
            self.reached = self.num

    def fn(self, y, args):
        jax.debug.callback(self, y, ordered=True)
        return self.problem.fn(y, args)


def count_ours(problem, solver) -> int | None:
    recorder = _Recorder(problem)

    @jax.jit
    def run(y0, args):
        return eqlx.fixed_point(
            recorder.fn, solver, y0, args, max_steps=MAX_STEPS, throw=False
        ).value

    jax.block_until_ready(run(problem.y0, problem.args))
    jax.effects_barrier()
    return recorder.reached


@dataclasses.dataclass(frozen=True)
class Solve:
    """A whole solve of a problem.

    **Attributes:**

    - `status`: The name of its result.
    - `is_true`: Whether that is so: what claims to have converged is as near to the
        solution as its residual implies, and what does not had not reached its
        tolerance.
    """

    num_evals: int
    milliseconds: float
    error: float
    status: str
    is_true: bool

    def __str__(self):
        error = f"{self.error:.0e}" if np.isfinite(self.error) else "-"
        numbers = f"{self.num_evals} / {self.milliseconds:.2f} / {error}"
        return numbers if self.status == "successful" else f"{numbers} {self.status}"


def solve_ours(problem, solver) -> Solve:
    """Solve to a tolerance that implies the target."""
    factor = problems.amplification(problem)
    tolerance = max(TARGET / factor, 10 * problem.rounding)
    solver = dataclasses.replace(solver, atol=tolerance)

    @jax.jit
    def run(y0, args):
        sol = eqlx.fixed_point(
            problem.fn, solver, y0, args, max_steps=MAX_STEPS, throw=False
        )
        names = {name: sol.result == getattr(eqlx.RESULTS, name) for name in _RESULTS}
        return sol.value, sol.stats["num_fn_evals"], sol.stats["residual"], names

    call = lambda: run(problem.y0, problem.args)
    value, num_evals, residual, names = jax.block_until_ready(call())
    times = compare({"solve": call}, repeats=5, title="time")
    status = next((name for name, is_it in names.items() if is_it), "successful")
    error, residual = problems.error(problem, value), float(residual)
    bound = factor * (1.1 * residual + max(1e-12, 2 * problem.rounding))
    is_converged = status == "successful"
    is_true = is_converged == (residual < tolerance)
    is_true = is_true and (not is_converged or error <= bound)
    return Solve(int(num_evals), times["solve"], error, status, is_true)


def count_scipy(problem, method: Callable) -> int | None:
    recorder = _Recorder(problem)
    flat, unravel = ravel_pytree(problem.y0)
    fn = jax.jit(lambda x: ravel_pytree(problem.fn(unravel(x), problem.args))[0] - x)

    def residual(x):
        recorder(unravel(x))
        if recorder.reached is not None:
            raise _Reached
        return np.asarray(fn(x))

    try:
        method(residual, np.asarray(flat), maxiter=MAX_STEPS, f_tol=1e-13)
    except _Reached:
        return recorder.reached
    except (scipy.optimize.NoConvergence, ValueError):
        return None
    return recorder.reached


def _jaxopt(name: str) -> Any:
    if importlib.util.find_spec("jaxopt") is None:
        return None
    return getattr(importlib.import_module("jaxopt"), name)


def count_jaxopt_anderson(problem) -> int | None:
    method, recorder = _jaxopt("AndersonAcceleration"), _Recorder(problem)
    if method is None:
        return None
    solver = method(recorder.fn, history_size=5, maxiter=MAX_STEPS, tol=1e-13, jit=True)
    return _run_jaxopt(solver, problem.y0, problem.args, recorder)


def count_jaxopt_broyden(problem) -> int | None:
    method, recorder = _jaxopt("Broyden"), _Recorder(problem)
    if method is None:
        return None
    flat, unravel = ravel_pytree(problem.y0)

    def root(x, args):
        return ravel_pytree(recorder.fn(unravel(x), args))[0] - x

    # With all of its history, and without the line search that costs it evaluations.
    solver = method(root, maxiter=MAX_STEPS, tol=1e-13, stepsize=1.0, jit=True)
    return _run_jaxopt(solver, flat, problem.args, recorder)


def _run_jaxopt(solver, y0, args, recorder: _Recorder) -> int | None:
    try:
        jax.block_until_ready(solver.run(y0, args).params)
    except (TypeError, ValueError):  # It mixes up dtypes, or has none for complex.
        return None
    jax.effects_barrier()
    return recorder.reached


def _print_row(name: str, cells: list):
    row = ["-" if cell is None else str(cell) for cell in cells]
    tqdm.write(f"| {name} | " + " | ".join(row) + " |")


def _print_head(names: list[str]):
    print("\n| problem | " + " | ".join(names) + " |")
    print("|---" * (1 + len(names)) + "|")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=problems.NAMES)
    names = parser.parse_args().names
    jax.config.update("jax_enable_x64", True)
    print(f"{describe()}; float64, true error below {TARGET:g}, or 10 roundings")
    others = {
        "SciPy anderson(5)": lambda p: count_scipy(p, scipy.optimize.anderson),
        "SciPy broyden1": lambda p: count_scipy(p, scipy.optimize.broyden1),
        "JAXopt Anderson(5)": count_jaxopt_anderson,
        "JAXopt Broyden": count_jaxopt_broyden,
    }
    _print_head([*_counted, *others])
    for name in tqdm(names, leave=False):
        problem = problems.make(name)
        cells = [count_ours(problem, solver) for solver in _counted.values()]
        _print_row(name, cells + [count(problem) for count in others.values()])
    print("\nEvaluations / milliseconds / true error, and the status of what failed:")
    _print_head(list(_timed))
    lies = []
    for name in tqdm(names, leave=False):
        problem = problems.make(name)
        solves = {k: solve_ours(problem, solver) for k, solver in _timed.items()}
        lies += [f"{k} on {name}" for k, solve in solves.items() if not solve.is_true]
        _print_row(name, list(solves.values()))
    print(f"\nStatuses that are not true: {lies or 'none'}")


if __name__ == "__main__":
    main()
