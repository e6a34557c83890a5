"""Each way a solve can end is said, per sample, at the step where it happens."""

import functools as ft
from typing import Any

import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import is_successful


def _solve(
    fn, y0, *, rtol=1e-6, atol=1e-6, solver: Any = eqlx.FixedPointIteration, **kwargs
):
    return eqlx.fixed_point(fn, solver(rtol, atol), y0, throw=False, **kwargs)


def test_running_out_of_steps_is_reported_with_the_residual_reached():
    sol = _solve(lambda y, _: 0.9 * y + 1, jnp.array(0.0), max_steps=5)
    assert sol.result == eqlx.RESULTS.max_steps_reached
    assert sol.stats["num_steps"] == 5
    assert sol.stats["num_fn_evals"] == 6
    assert jnp.allclose(sol.value, 1 + 0.9 + 0.9**2 + 0.9**3 + 0.9**4)
    assert jnp.allclose(sol.stats["residual"], 0.9**5)
    with pytest.raises(Exception, match="reached `max_steps`"):
        eqlx.fixed_point(
            lambda y, _: 0.9 * y + 1,
            eqlx.FixedPointIteration(1e-6, 1e-6),
            jnp.array(0.0),
            max_steps=5,
        )


def test_the_last_allowed_step_counts():
    fn = lambda y, _: 0.5 * y
    need = int(_solve(fn, jnp.array(1.0)).stats["num_steps"])
    assert is_successful(_solve(fn, jnp.array(1.0), max_steps=need))
    short = _solve(fn, jnp.array(1.0), max_steps=need - 1)
    assert short.result == eqlx.RESULTS.max_steps_reached


def test_both_tolerances_zero_is_an_exact_number_of_steps():
    sol = _solve(
        lambda y, _: 0.5 * y + 1, jnp.array(0.0), rtol=0.0, atol=0.0, max_steps=3
    )
    assert sol.value == 1.75
    assert sol.stats["num_steps"] == 3
    assert is_successful(sol)


def test_traced_zero_tolerances_are_a_budget_too():
    @jax.jit
    def run(tol):
        fn = lambda y, _: 0.5 * y + 1
        return _solve(fn, jnp.array(0.0), rtol=tol, atol=tol, max_steps=3)

    assert is_successful(run(jnp.array(0.0)))
    assert run(jnp.array(1e-9)).result == eqlx.RESULTS.max_steps_reached


@pytest.mark.parametrize("solver", ["max", "two", "type_i", "newton"])
@pytest.mark.parametrize(
    ("rtol", "atol"), [(-1e-3, -1e-3), (1e-1, -1e-3), (-1e-3, 1e-1)]
)
def test_a_traced_tolerance_below_zero_is_never_reached(solver, rtol, atol):
    new = {
        "max": eqlx.FixedPointIteration,
        "two": ft.partial(eqlx.Anderson, norm=eqlx.two_norm),
        "type_i": eqlx.AndersonTypeI,
        "newton": eqlx.Newton,
    }[solver]

    @jax.jit
    def run(rtol, atol):
        fn = lambda y, _: jnp.tanh(y) + y / 3 + 1
        return _solve(fn, jnp.array([1.0, 4.0]), rtol=rtol, atol=atol, solver=new)

    for sol in (run(rtol, atol), jax.vmap(run)(*jnp.array([[rtol], [atol]]))):
        # The root of `tanh(y) + y / 3 + 1 - y`, by bisection. What no longer moves has
        # converged, whatever the tolerance.
        assert jnp.allclose(sol.value, 2.9924699, atol=1e-5)
        assert jnp.all(sol.stats["num_steps"] > 2)


def test_a_tolerance_below_zero_is_refused_where_it_can_be_read():
    values: tuple[Any, ...] = (-1e-3, np.float32(-1e-3), np.array(-1e-3))
    for value in (*values, jnp.array(-1e-3)):
        with pytest.raises(ValueError, match="`atol` must not be negative"):
            eqlx.Anderson(1e-3, value)


def test_a_purely_relative_test_ends_at_zero():
    sol = _solve(lambda y, _: 0.5 * y, jnp.float32(1.0), atol=0.0, max_steps=500)
    assert is_successful(sol)
    assert abs(sol.value) < 2e-38  # Where float32 underflows.


@pytest.mark.parametrize("start", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_start_that_is_not_finite_ends_at_once(start):
    sol = _solve(lambda y, _: jnp.cos(y), jnp.array(start), max_steps=1000)
    assert sol.result == eqlx.RESULTS.nonfinite
    assert sol.stats["num_steps"] == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("max_steps", [3, 4, 100])
def test_a_map_that_turns_nonfinite_is_caught_at_that_step(bad, max_steps):
    fn = lambda y, _: jnp.where(y >= 3, bad, y + 1)
    sol = _solve(fn, jnp.array(0.0), max_steps=max_steps)
    assert sol.result == eqlx.RESULTS.nonfinite
    assert sol.stats["num_steps"] == 3
    assert sol.value == 3  # The last iterate that was finite.


def test_a_trial_at_the_last_step_is_not_what_is_returned():
    # The fourth iterate is an extrapolation to where the map has no value; from there
    # Anderson's method goes back, if it may take another step.
    def fn(y, _):
        return jnp.where(y > 1.0005, jnp.nan, jnp.sqrt(y) + 0.9 * (y - jnp.sqrt(y)))

    best = np.inf
    for max_steps in (3, 4, 5):
        sol = _solve(
            fn, jnp.array(0.3), max_steps=max_steps, solver=eqlx.Anderson, rtol=1e-6
        )
        assert sol.result == eqlx.RESULTS.max_steps_reached
        residual = float(jnp.abs(fn(sol.value, None) - sol.value))
        assert np.isclose(sol.stats["residual"], residual, rtol=1e-12)
        assert residual <= best
        best = residual


def test_one_bad_element_among_many_is_seen():
    fn = lambda y, _: (0.5 * y).at[17].set(jnp.nan)
    assert _solve(fn, jnp.ones(40)).result == eqlx.RESULTS.nonfinite


def test_a_norm_that_looks_away_does_not_hide_what_is_not_finite():
    first = lambda tree: jnp.max(jnp.abs(tree[:1]))
    solver = lambda rtol, atol: eqlx.FixedPointIteration(rtol, atol, norm=first)
    fn = lambda y, _: (0.5 * y).at[1].set(jnp.nan)
    assert _solve(fn, jnp.ones(3), solver=solver).result == eqlx.RESULTS.nonfinite


def test_divergence_is_told_long_before_overflow():
    sol = _solve(lambda y, _: 2 * y + 1, jnp.array(0.0), max_steps=1000)
    assert sol.result == eqlx.RESULTS.divergence
    assert sol.stats["num_steps"] == 27  # 2^27 > 1e8 > 2^26
    squared = _solve(lambda y, _: y**2, jnp.array(3.0))
    assert squared.result in (eqlx.RESULTS.divergence, eqlx.RESULTS.nonfinite)


def test_growth_that_passes_is_not_divergence():
    # Not normal: the step grows 40-fold before it decays.
    matrix = jnp.array([[0.9, 100.0], [0.0, 0.9]])
    fn = lambda y, _: matrix @ y + jnp.array([0.0, 1.0])
    sol = _solve(fn, jnp.zeros(2), rtol=1e-7, atol=1e-4, max_steps=3000)
    assert is_successful(sol)
    assert jnp.allclose(sol.value, jnp.array([10000.0, 10.0]), rtol=1e-5)


def test_slow_convergence_is_not_stagnation():
    fn = lambda y, _: 0.9995 * y + 1
    sol = _solve(fn, jnp.array(0.0), rtol=1e-6, atol=0.0, max_steps=40_000)
    assert is_successful(sol)
    assert sol.stats["num_steps"] > 5000


@pytest.mark.parametrize("solver", [eqlx.FixedPointIteration, eqlx.Anderson])
def test_a_tolerance_below_the_dtype_stops_in_bounded_steps(getkey, solver):
    turn = jnp.array([[0.0, -0.9], [0.9, 0.0]], jnp.float32)
    fn = lambda y, _: turn @ jnp.tanh(y) + jnp.array([1.0, 0.3], jnp.float32)
    sol = _solve(
        fn,
        jnp.zeros(2, jnp.float32),
        rtol=1e-12,
        atol=1e-12,
        max_steps=20_000,
        solver=solver,
    )
    assert sol.stats["num_steps"] < 400
    # It may land on a fixed point of the rounded map, which is a success.
    if not is_successful(sol):
        assert sol.result == eqlx.RESULTS.stagnation
    assert sol.stats["residual"] < 1e-6


def test_a_limit_cycle_is_stagnation():
    sol = _solve(lambda y, _: 1 - y, jnp.array(0.2), max_steps=20_000)
    assert sol.result == eqlx.RESULTS.stagnation
    assert sol.stats["num_steps"] <= 1001


def test_an_infinite_relative_tolerance_of_a_diverged_sample_is_no_success():
    # inf <= rtol * inf is true, so a test of that shape lets it pass.
    fn = lambda y, a: a * y + 1
    solve = lambda a: _solve(fn, jnp.array(0.0), args=a, rtol=1e-3, max_steps=500)
    sol = jax.jit(jax.vmap(solve))(jnp.array([0.5, 1e200, 0.9]))
    assert is_successful(sol).tolist() == [True, False, True]
    assert jnp.allclose(sol.value[jnp.array([0, 2])], jnp.array([2.0, 10.0]), rtol=0.02)


def test_leaves_of_different_scale_are_each_held_to_the_tolerance():
    fn = lambda y, _: (0.9 * y[0] + 1e6, 0.9 * y[1] + 1e-6)
    zero = (jnp.array(0.0), jnp.array(0.0))
    sol = _solve(fn, zero, rtol=1e-5, atol=1e-10)
    assert jnp.allclose(sol.value[0], 1e7, rtol=1e-3)
    assert jnp.allclose(sol.value[1], 1e-5, rtol=1e-3)


def test_statuses_are_readable_under_every_transform():
    run = lambda a: _solve(
        lambda y, a: a * y + 1, jnp.array(0.0), args=a, max_steps=100
    )
    a = jnp.array([0.001, 0.9999])
    ok = lambda sol: is_successful(sol).tolist()
    assert ok(jax.vmap(run)(a)) == [True, False]
    assert ok(jax.jit(jax.vmap(run))(a)) == [True, False]
    _, sols = jax.lax.scan(lambda c, a: (c, run(a)), 0, a)
    assert ok(sols) == [True, False]
    value = lambda a: (lambda sol: (sol.value, sol))(run(a))
    (_, sol), _ = jax.value_and_grad(value, has_aux=True)(a[1])
    assert sol.result == eqlx.RESULTS.max_steps_reached


def test_an_error_tells_how_many_samples_failed_and_how():
    def solve(c):
        solver = eqlx.FixedPointIteration(0.0, 1e-6)
        fn = lambda y, c: c * y + 1
        return eqlx.fixed_point(fn, solver, jnp.zeros(()), c, max_steps=50).value

    assert jnp.allclose(jax.vmap(solve)(jnp.array([0.5, 0.75])), jnp.array([2.0, 4.0]))
    with pytest.raises(Exception, match=r"fixed-point solve failed\.\n`divergence`: "):
        jax.block_until_ready(solve(jnp.array(2.0)))
    rates = jnp.array([0.5, 2.0, 0.99, jnp.nan, 3.0, 0.1])
    message = (
        r"(?s)failed for 4 of 6 samples\.\n`max_steps_reached`: .*\n"
        r"`divergence`: .*\n`nonfinite`: .*\n`throw=False` returns"
    )
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.vmap(solve)(rates))
    with pytest.raises(Exception, match=r"failed for 4 of 6 samples\."):
        jax.block_until_ready(jax.jit(jax.vmap(jax.vmap(solve)))(rates.reshape(2, 3)))
    # Without a bad sample nothing is raised, and there is a gradient.
    loss = lambda c: jnp.sum(jax.vmap(solve)(c))
    grad = jax.jit(jax.grad(loss))(jnp.array([0.5, 0.75]))
    assert jnp.allclose(grad, jnp.array([4.0, 16.0]), rtol=1e-4)


def test_a_result_alone_is_checked_too():
    fn = lambda y, _: y + 1
    solver = eqlx.FixedPointIteration(0.0, 1e-6)
    run = jax.jit(lambda y: eqlx.fixed_point(fn, solver, y).stats["num_steps"])
    with pytest.raises(Exception, match="max_steps"):
        jax.block_until_ready(run(jnp.zeros(())))
