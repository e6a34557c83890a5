"""When Auto changes its method, and that it does so for each sample by itself."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax._solver import Evaluation, phase

from . import problems
from .helpers import is_successful, optimised_hlo


def _evals(solver, problem):
    sol = eqlx.fixed_point(
        problem.fn, solver, problem.y0, problem.args, max_steps=3000, throw=False
    )
    return int(sol.stats["num_fn_evals"]) if is_successful(sol) else np.inf


@pytest.mark.parametrize("name", ["linear_0.9", "expanding", "discrete_choice"])
def test_takes_hardly_more_evaluations_than_the_best_of_its_methods(name):
    problem = problems.make(name)
    tol = max(1e-9, 10 * problem.rounding)
    fixed = (eqlx.FixedPointIteration, eqlx.Anderson, eqlx.NewtonKrylov)
    best = min(_evals(solver(0.0, tol), problem) for solver in fixed)
    assert _evals(eqlx.Auto(0.0, tol), problem) <= 1.3 * best


def _shift(n):
    return jnp.eye(n)[jnp.roll(jnp.arange(n), 1)]


def test_solves_what_defeats_a_short_history():
    # I - J is a cyclic shift of 19 elements: the worst there is for a history of 10.
    shift = _shift(19)
    fn = lambda y, c: y - shift @ y + c
    c = jnp.arange(19.0)
    solve = lambda solver: eqlx.fixed_point(fn, solver, jnp.zeros(19), c, throw=False)
    assert not is_successful(solve(eqlx.Anderson(0.0, 1e-9, history_length=10)))
    sol = solve(eqlx.Auto(0.0, 1e-9))
    assert is_successful(sol)
    assert sol.stats["num_switches"] >= 1
    assert np.max(np.abs(sol.value - np.asarray(shift).T @ np.arange(19.0))) < 1e-7


def test_comes_back_from_a_method_that_gains_nothing():
    # GMRES with so short a restart gains nothing on a shift; the map contracts slowly.
    n = 30
    a = 0.9 * _shift(n)
    fn = lambda y, _: a @ y + jnp.cos(jnp.arange(n))
    sol = eqlx.fixed_point(
        fn,
        eqlx.Auto(0.0, 1e-8, history_length=2, restart=2),
        jnp.zeros(n),
        max_steps=900,
    )
    expected = np.linalg.solve(np.eye(n) - np.asarray(a), np.cos(np.arange(n)))
    assert np.max(np.abs(sol.value - expected)) < 1e-6
    assert sol.stats["num_switches"] >= 2


@pytest.mark.parametrize("scale", [4.0, 10.0])
def test_newton_is_tried_before_it_is_judged(getkey, scale):
    # Linear maps that nothing but Newton's method solves: Anderson is far astray when
    # the methods change.
    n, num = 18, 16
    maps = scale * jr.normal(getkey(), (num, n, n)) / n**0.5
    c = jr.normal(getkey(), (num, n))
    solve = lambda a, c: eqlx.fixed_point(
        lambda y, _: a @ y + c,
        eqlx.Auto(0.0, 1e-8),
        jnp.zeros(n),
        max_steps=150,
        throw=False,
    )
    sol = jax.jit(jax.vmap(solve))(maps, c)
    assert np.all(sol.result == eqlx.RESULTS.successful)
    for a, c_i, y in zip(maps, c, sol.value, strict=True):
        inverse = np.linalg.inv(np.eye(n) - np.asarray(a))
        bound = 1e-8 * np.abs(inverse).sum(1).max()
        assert np.max(np.abs(y - inverse @ np.asarray(c_i))) < bound


def test_leaves_a_place_where_fn_has_no_value():
    # Anderson's plain step from the start leaves the domain; Newton's, searching, not.
    fn = lambda y, _: y - 3 * (jnp.log(y) - 1)
    start = jnp.array([0.1])
    sol = eqlx.fixed_point(fn, eqlx.Auto(0.0, 1e-10), start, throw=False)
    assert is_successful(sol)
    assert np.allclose(sol.value, np.e, rtol=1e-9)


def test_each_sample_of_a_batch_has_its_own_method(getkey):
    q, _ = jnp.linalg.qr(jr.normal(getkey(), (19, 19)))
    easy = q @ jnp.diag(jnp.linspace(-0.3, 0.3, 19)) @ q.T
    hard = jnp.eye(19) - _shift(19)
    matrices = jnp.stack([easy, hard, easy, 0.5 * easy, hard, easy])
    c = jr.normal(getkey(), (6, 19))
    solve = lambda a, c: eqlx.fixed_point(
        lambda y, _: a @ y + c, eqlx.Auto(0.0, 1e-9), jnp.zeros(19), throw=False
    )
    sol = jax.jit(jax.vmap(solve))(matrices, c)
    assert np.all(sol.result == eqlx.RESULTS.successful)
    switched = (sol.stats["num_switches"] > 0).tolist()
    assert switched == [False, True, False, False, True, False]
    for a, c_i, y in zip(matrices, c, sol.value, strict=True):
        expected = np.linalg.solve(np.eye(19) - np.asarray(a), np.asarray(c_i))
        assert np.max(np.abs(y - expected)) < 1e-6
    # What is easy costs as if it were alone.
    alone = solve(matrices[0], c[0])
    assert alone.stats["num_fn_evals"] == sol.stats["num_fn_evals"][0]


def test_what_fails_says_so():
    sol = eqlx.fixed_point(
        lambda y, _: y + 1 + y**2, eqlx.Auto(0.0, 1e-9), jnp.ones(3), throw=False
    )
    assert not is_successful(sol)
    nan = eqlx.fixed_point(
        lambda y, _: y * jnp.nan, eqlx.Auto(0.0, 1e-9), jnp.ones(3), throw=False
    )
    assert nan.result == eqlx.RESULTS.nonfinite


def test_newton_is_not_computed_unless_it_is_wanted():
    # Its basis is the largest array: it lives in a loop of its own, of no pass.
    def solve(x):
        solver = eqlx.Auto(0.0, 1e-6, history_length=3, restart=11)
        fn = lambda y, x: 0.5 * jnp.tanh(y) + x
        return eqlx.fixed_point(fn, solver, 0 * x, x, throw=False, max_steps=40).value

    text = optimised_hlo(jax.vmap(solve), jnp.ones((4, 32), jnp.float32))
    owners = [part for part in text.split("\n\n") if "f32[4,12,32]" in part]
    assert owners
    # Three loops deep: the solve, whether it is wanted, and that of GMRES.
    assert text.count("while(") >= 3


def _watch(residuals, bests, start=None):
    """The methods and starts as the residuals come in."""
    now = phase.begin(3, jnp.float64) if start is None else start
    seen = []
    for residual, best in zip(residuals, bests, strict=True):
        yes, y = jnp.array(True), jnp.zeros(())
        at = Evaluation(
            y=y,
            f=y,
            residual=jnp.array(residual),
            scaled=jnp.array(residual),
            size=jnp.array(1.0),
            best=y,
            best_residual=jnp.array(best),
            num_steps=jnp.array(0, jnp.int32),
            is_live=yes,
            proceed=yes,
            is_trial=yes,
            is_finite=jnp.isfinite(jnp.array(residual)),
        )
        windows = jnp.array([2, 1, 2], jnp.int32)
        now = phase.advance(now, at, jnp.array(False), windows, -0.3)
        seen.append(now)
    return seen


def test_what_gains_nothing_gives_way_to_each_of_the_others():
    seen = _watch([1.0] * 12, [1.0] * 12)
    methods = [int(now.method) for now in seen]
    assert methods[:6] == [0, 0, 1, 2, 2, 0]
    assert set(methods[6:]) == {0, 1, 2}


def test_a_method_is_measured_from_where_it_begins():
    # Anderson is astray when it gives way: Newton's begins at the best iterate.
    seen = _watch([1.0, 3.0, 3.0, 1.0, 0.1], [1.0, 1.0, 1.0, 1.0, 0.1])
    assert [int(now.method) for now in seen] == [0, 0, 1, 1, 1]
    assert np.isinf(seen[2].start)
    assert seen[3].start == 1
    assert np.isclose(seen[4].slopes[1], np.log(0.1))
    # One that is fast enough is not left, slow ones are compared by evaluation.
    seen = _watch([1.0, 0.5, 0.25, 0.2, 0.1], [1.0, 0.5, 0.25, 0.2, 0.1])
    assert [int(now.method) for now in seen] == [0] * 5


def test_what_leads_astray_gives_way_at_once():
    seen = _watch([1.0, np.nan], [1.0, 1.0])
    assert [int(now.method) for now in seen] == [0, 1]
    assert seen[1].num_broken == 1
    seen = _watch([1.0, 1e5], [1.0, 1.0])
    assert int(seen[1].method) == 1
