"""Evaluations that solvers need, ours and others', on problems with known answers.

    python -m bench.solvers

Counted are the evaluations of `fn` up to the first at a point whose true error is below
a target, whatever the solver's own rule of stopping would have been: an equal accuracy
for all. SciPy comes with the extra `examples`; JAXopt is left out where it is missing.
"""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable

import equilax as eqlx
import jax
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from tests import problems
from tqdm import tqdm

from .timing import describe


MAX_STEPS = 3000
TARGET = 1e-8

_ours = {
    "iteration": eqlx.FixedPointIteration(0.0, 0.0),
    "Anderson(5)": eqlx.Anderson(0.0, 0.0),
    "Anderson(10)": eqlx.Anderson(0.0, 0.0, history_length=10),
    "Broyden(10)": eqlx.Broyden(0.0, 0.0),
    "Broyden(30)": eqlx.Broyden(0.0, 0.0, history_length=30),
    "Squarem": eqlx.Squarem(0.0, 0.0),
    "Aitken": eqlx.Aitken(0.0, 0.0),
}


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


def count_ours(problem, solver) -> tuple[int | None, bool]:
    """The count, and whether a solve with a tolerance claims what is not true."""
    recorder = _Recorder(problem)

    @jax.jit
    def run(y0, args):
        return eqlx.fixed_point(
            recorder.fn, solver, y0, args, max_steps=MAX_STEPS, throw=False
        ).value

    jax.block_until_ready(run(problem.y0, problem.args))
    jax.effects_barrier()
    return recorder.reached, _is_truthful(problem, solver)


def _is_truthful(problem, solver) -> bool:
    solver = dataclasses.replace(solver, atol=_target(problem))
    sol = eqlx.fixed_point(
        problem.fn,
        solver,
        problem.y0,
        problem.args,
        max_steps=MAX_STEPS,
        throw=False,
    )
    if sol.result != eqlx.RESULTS.successful:
        return True
    residual = 1.1 * float(sol.stats["residual"]) + max(1e-12, 2 * problem.rounding)
    bound = problems.amplification(problem) * residual
    return problems.error(problem, sol.value) <= bound


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


def count_jaxopt(problem) -> int | None:
    if importlib.util.find_spec("jaxopt") is None:
        return None
    jaxopt = importlib.import_module("jaxopt")
    recorder = _Recorder(problem)
    solver = jaxopt.AndersonAcceleration(
        recorder.fn, history_size=5, maxiter=MAX_STEPS, tol=1e-13, jit=True
    )
    try:
        jax.block_until_ready(solver.run(problem.y0, problem.args).params)
    except TypeError:  # It mixes up the dtypes of leaves.
        return None
    jax.effects_barrier()
    return recorder.reached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=problems.NAMES)
    names = parser.parse_args().names
    jax.config.update("jax_enable_x64", True)
    print(f"{describe()}; float64, true error below {TARGET:g}, or 10 roundings")
    others = {
        "SciPy anderson(5)": lambda p: count_scipy(p, scipy.optimize.anderson),
        "SciPy broyden1": lambda p: count_scipy(p, scipy.optimize.broyden1),
        "JAXopt Anderson(5)": count_jaxopt,
    }
    print("| problem | " + " | ".join([*_ours, *others]) + " |")
    print("|---" * (1 + len(_ours) + len(others)) + "|")
    lies = []
    for name in tqdm(names, leave=False):
        problem, cells = problems.make(name), []
        for title, solver in _ours.items():
            count, is_truthful = count_ours(problem, solver)
            cells.append(count)
            lies += [] if is_truthful else [f"{title} on {name}"]
        cells += [count(problem) for count in others.values()]
        row = ["-" if cell is None else str(cell) for cell in cells]
        tqdm.write(f"| {name} | " + " | ".join(row) + " |")
    print(f"Claims of convergence beyond what the residual implies: {lies or 'none'}")


if __name__ == "__main__":
    main()
