"""What says converged is, and what is not says why: every solver on every problem."""

import equilax as eqlx
import pytest

from . import problems


_solvers = {
    "picard": eqlx.FixedPointIteration,
    "anderson": eqlx.Anderson,
    "type_i": eqlx.AndersonTypeI,
    "broyden": eqlx.Broyden,
    "bad_broyden": eqlx.BadBroyden,
    "newton_krylov": eqlx.NewtonKrylov,
    "squarem": eqlx.Squarem,
    "aitken": eqlx.Aitken,
}
# Extrapolation element by element is not for elements that depend on each other.
_MAY_FAIL = {"aitken"}
_ELEMENTWISE = {"cosine", "kepler", "complex"}


@pytest.mark.parametrize("name", problems.NAMES)
def test_every_solver_is_right_or_says_that_it_is_not(name):
    problem = problems.make(name)
    bound = problems.amplification(problem)
    tolerance = max(1e-9, 10 * problem.rounding)
    for kind, solver in _solvers.items():
        sol = eqlx.fixed_point(
            problem.fn,
            solver(0.0, tolerance),
            problem.y0,
            problem.args,
            max_steps=30_000,
            throw=False,
        )
        is_successful = bool(sol.result == eqlx.RESULTS.successful)
        residual = float(sol.stats["residual"])
        assert is_successful == (residual < tolerance), kind
        if is_successful:
            # The bound is of first order.
            slack = bound * max(1e-12, 2 * problem.rounding)
            error = problems.error(problem, sol.value)
            assert error < 1.1 * bound * residual + slack
        must = problem.contracts if kind == "picard" else kind not in _MAY_FAIL
        if kind == "squarem" and not problem.contracts:
            must = False
        if must or name in _ELEMENTWISE:
            assert is_successful, kind


def test_what_expands_diverges_under_plain_iteration():
    problem = problems.make("expanding")
    sol = eqlx.fixed_point(
        problem.fn,
        eqlx.FixedPointIteration(0.0, 1e-9),
        problem.y0,
        problem.args,
        throw=False,
    )
    assert sol.result == eqlx.RESULTS.divergence
