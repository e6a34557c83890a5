"""What every solver does alike, and what is special to one."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import every_solver, is_successful, newton, tanh_cell, tanh_problem


_names = list(every_solver(0.0, 0.0))
solvers = pytest.mark.parametrize("name", _names)


@solvers
def test_finds_the_fixed_point_of_a_cell(getkey, name):
    args = tanh_problem(getkey(), 20, 0.8)
    sol = eqlx.fixed_point(
        tanh_cell, every_solver(0.0, 1e-12)[name], jnp.zeros(20), args
    )
    expected = newton(tanh_cell, jnp.zeros(20), args)
    assert is_successful(sol)
    # The distance is the residual over one minus the contraction factor.
    assert np.max(np.abs(sol.value - expected)) < 1e-12 * 20**0.5 / (1 - 0.8)


@solvers
@pytest.mark.parametrize("rho", [0.5, 0.99])
def test_linear_maps(getkey, name, rho):
    q, _ = jnp.linalg.qr(jr.normal(getkey(), (8, 8)))
    spectrum = jnp.linspace(-rho, rho, 8)
    a = (q * spectrum[None]) @ q.T
    b = jr.normal(getkey(), (8,))
    expected = np.linalg.solve(np.eye(8) - a, b)
    solver = every_solver(0.0, 1e-10)[name]
    sol = eqlx.fixed_point(
        lambda y, c: c[0] @ y + c[1], solver, jnp.zeros(8), (a, b), max_steps=4000
    )
    assert np.max(np.abs(sol.value - expected)) < 1e-10 * 8**0.5 / (1 - rho)


@solvers
def test_the_residual_reported_is_that_of_the_value_returned(getkey, name):
    args = tanh_problem(getkey(), 6, 0.9)
    for max_steps in (1, 4, 400):
        sol = eqlx.fixed_point(
            tanh_cell,
            every_solver(0.0, 1e-8)[name],
            jnp.ones(6),
            args,
            max_steps=max_steps,
            throw=False,
        )
        true = np.max(np.abs(tanh_cell(sol.value, args) - sol.value))
        assert abs(sol.stats["residual"] - true) <= 1e-15
        assert is_successful(sol) == (true < 1e-8)


@solvers
def test_a_start_at_the_solution_takes_no_step(name):
    start = jnp.full(3, 2.0)
    sol = eqlx.fixed_point(
        lambda y, _: 0.5 * y + 1, every_solver(1e-8, 1e-8)[name], start
    )
    assert is_successful(sol)
    assert sol.stats["num_steps"] == 0
    assert sol.stats["num_fn_evals"] == 1
    assert jnp.all(sol.value == start)


@solvers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_keeps_the_dtype_of_y0_and_reaches_its_precision(name, dtype):
    eps = float(jnp.finfo(dtype).eps)
    solver = every_solver(4 * eps, 4 * eps)[name]
    sol = eqlx.fixed_point(lambda y, _: jnp.cos(y), solver, jnp.ones(3, dtype))
    assert sol.value.dtype == dtype
    assert sol.stats["residual"].dtype == max(jnp.float32, dtype, key=jnp.dtype)
    # 1 / (1 - |f'|) is 0.6 here; half the budget is left for the rounding of `cos`.
    error = np.abs(np.asarray(sol.value, np.float64) - 0.7390851332151607)
    assert np.max(error) < 10 * eps


@solvers
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_iterates(name, dtype):
    a = jnp.array([[0.3 + 0.4j, 0.2], [-0.1j, 0.5]], dtype)
    b = jnp.array([1 - 2j, 0.5j], dtype)
    tol = 10 * float(jnp.finfo(dtype).eps)
    sol = eqlx.fixed_point(
        lambda y, c: c[0] @ y + c[1], every_solver(0.0, tol)[name], 0 * b, (a, b)
    )
    expected = np.linalg.solve(np.eye(2) - np.asarray(a), np.asarray(b))
    assert sol.value.dtype == dtype
    assert np.max(np.abs(np.asarray(sol.value) - expected)) < 10 * tol


@solvers
@pytest.mark.parametrize("exponent", [-80, 80])
def test_the_scale_of_the_problem_does_not_matter_in_float32(getkey, name, exponent):
    scale = 2.0**exponent  # Which rounds nothing.
    a = 0.8 * jnp.linalg.qr(jr.normal(getkey(), (6, 6)))[0].astype(jnp.float32)
    b = jr.normal(getkey(), (6,)).astype(jnp.float32)
    solver = every_solver(1e-5, 0.0)[name]
    fn = lambda y, c: a @ y + c
    unit = eqlx.fixed_point(fn, solver, jnp.zeros(6, jnp.float32), b)
    scaled = eqlx.fixed_point(
        fn, solver, jnp.zeros(6, jnp.float32), b * jnp.float32(scale)
    )
    expected = np.linalg.solve(np.eye(6) - np.asarray(a, np.float64), b)
    assert is_successful(scaled)
    assert scaled.stats["num_steps"] == unit.stats["num_steps"]
    error = np.max(np.abs(np.asarray(scaled.value, np.float64) / scale - expected))
    assert error < 1e-4 * np.max(np.abs(expected))


@solvers
def test_pytrees_with_leaves_of_several_shapes_and_dtypes(name):
    y0 = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros((), jnp.float32), jnp.zeros((0, 4)))}

    def fn(y, c):
        a, (b, empty) = y["a"], y["b"]
        coupled = 0.3 * a + 0.2 * b.astype(a.dtype) + c
        return {"a": coupled, "b": (0.5 * b + jnp.float32(1), empty)}

    sol = eqlx.fixed_point(fn, every_solver(1e-7, 1e-7)[name], y0, 2.0)
    assert jnp.allclose(sol.value["b"][0], 2.0, rtol=1e-6)
    assert jnp.allclose(sol.value["a"], 2.4 / 0.7, rtol=1e-6)
    assert sol.value["b"][1].shape == (0, 4)


@solvers
def test_an_empty_array_is_converged(name):
    sol = eqlx.fixed_point(
        lambda y, _: 0.5 * y, every_solver(1e-6, 1e-6)[name], jnp.zeros(0)
    )
    assert is_successful(sol)
    assert sol.value.shape == (0,)


@solvers
def test_tolerances_may_be_traced_and_do_not_recompile(name):
    traces = []

    @jax.jit
    def run(tol):
        traces.append(None)
        solver = every_solver(tol, tol)[name]
        return eqlx.fixed_point(lambda y, _: jnp.cos(y), solver, jnp.ones(2))

    loose, tight = run(jnp.array(1e-3)), run(jnp.array(1e-10))
    assert len(traces) == 1
    assert loose.stats["num_steps"] < tight.stats["num_steps"]
    assert np.max(np.abs(tight.value - 0.7390851332151607)) < 1e-9


@pytest.mark.parametrize("history_length", [1, 2, 5, 12])
def test_anderson_solves_a_linear_system_as_gmres_does(getkey, history_length):
    # With room for as many differences as there are unknowns it ends in n + 1 steps.
    n = 6
    a = jr.normal(getkey(), (n, n)) / (2 * n**0.5)
    b = jr.normal(getkey(), (n,))
    solver = eqlx.Anderson(0.0, 1e-9, history_length=history_length, ridge=0.0)
    sol = eqlx.fixed_point(lambda y, _: a @ y + b, solver, jnp.zeros(n))
    expected = np.linalg.solve(np.eye(n) - a, b)
    assert np.max(np.abs(sol.value - expected)) < 1e-7
    if history_length >= n:
        assert sol.stats["num_steps"] <= n + 1


def test_anderson_iterates_are_those_of_gmres(getkey):
    # Walker and Ni 2011, theorem 2.2: the map applied to the k-th GMRES iterate.
    n = 12
    a = 0.9 * jnp.linalg.qr(jr.normal(getkey(), (n, n)))[0]
    b = jr.normal(getkey(), (n,))
    matrix, rhs = np.eye(n) - np.asarray(a), np.asarray(b)
    krylov = [rhs]
    for _ in range(n):
        krylov.append(matrix @ krylov[-1])
    for k in range(1, 9):
        basis, _ = np.linalg.qr(np.stack(krylov[:k], axis=1))
        weights, *_ = np.linalg.lstsq(matrix @ basis, rhs, rcond=None)
        gmres = basis @ weights
        solver = eqlx.Anderson(0.0, 0.0, history_length=n, ridge=0.0)
        sol = eqlx.fixed_point(
            lambda y, _: a @ y + b, solver, jnp.zeros(n), max_steps=k + 1
        )
        expected = np.asarray(a) @ gmres + rhs
        error = np.linalg.norm(sol.value - expected) / np.linalg.norm(expected)
        assert error < 1e-8, k


def test_anderson_solves_what_the_plain_iteration_cannot():
    a = jnp.diag(jnp.array([-3.0, 0.5, 1.8]))
    b = jnp.array([1.0, 2.0, 3.0])
    fn = lambda y, _: a @ y + b
    plain = eqlx.fixed_point(
        fn, eqlx.FixedPointIteration(0.0, 1e-9), jnp.zeros(3), throw=False
    )
    assert not is_successful(plain)
    sol = eqlx.fixed_point(fn, eqlx.Anderson(0.0, 1e-9), jnp.zeros(3))
    assert jnp.allclose(sol.value, b / (1 - jnp.diagonal(a)), rtol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 1e-10, 1e-4])
def test_anderson_with_a_degenerate_history(ridge):
    solver = eqlx.Anderson(1e-8, 1e-8, ridge=ridge)
    constant = eqlx.fixed_point(lambda y, _: jnp.arange(3.0), solver, jnp.ones(3))
    assert jnp.allclose(constant.value, jnp.arange(3.0))
    rank_one = lambda y, _: 0.5 * jnp.ones(3) * y.mean() + 1
    sol = eqlx.fixed_point(rank_one, solver, jnp.arange(3.0))
    assert jnp.allclose(sol.value, 2.0, rtol=1e-7)
    budget = eqlx.Anderson(0.0, 0.0, ridge=ridge)
    sol = eqlx.fixed_point(lambda y, _: 0.5 * y + 1, budget, jnp.zeros(1), max_steps=60)
    assert jnp.allclose(sol.value, 2.0, rtol=1e-12)


def test_damping_converges_where_an_eigenvalue_is_below_minus_one():
    fn = lambda y, _: -1.2 * y + 1
    plain = eqlx.FixedPointIteration(0.0, 1e-9)
    sol = eqlx.fixed_point(fn, plain, jnp.zeros(()), throw=False)
    assert not is_successful(sol)
    damped = eqlx.FixedPointIteration(0.0, 1e-9, damp=0.5)
    sol = eqlx.fixed_point(fn, damped, jnp.zeros(()))
    assert jnp.allclose(sol.value, 1 / 2.2, rtol=1e-8)
    # A step is (1 - d) f + d y, by hand.
    two = eqlx.FixedPointIteration(0.0, 0.0, damp=0.25)
    sol = eqlx.fixed_point(fn, two, jnp.zeros(()), max_steps=2)
    assert jnp.allclose(sol.value, 0.75 * (-1.2 * 0.75 + 1) + 0.25 * 0.75)


def test_a_solve_that_fails_returns_the_iterate_of_the_smallest_residual():
    # Falls for three steps, then rises.
    path = jnp.array([8.0, 4.0, 2.0, 3.0, 7.0, 9.0, 9.5, 9.9])
    fn = lambda y, _: y + path[jnp.clip(y[1].astype(int), 0, 7)] * jnp.eye(2)[0] + unit
    unit = jnp.eye(2)[1]
    solver = eqlx.FixedPointIteration(0.0, 1e-3)
    sol = eqlx.fixed_point(fn, solver, jnp.zeros(2), max_steps=6, throw=False)
    assert sol.value[1] == 2
    assert sol.stats["residual"] == 2
    assert sol.stats["num_steps"] == 6
    assert sol.result == eqlx.RESULTS.max_steps_reached


def test_best_so_far_returns_the_best_also_where_fn_turned_nonfinite():
    path = jnp.array([8.0, 4.0, 2.0, 3.0, jnp.nan])
    fn = lambda y, _: y + path[jnp.clip(y[1].astype(int), 0, 4)] * jnp.eye(2)[0] + unit
    unit = jnp.eye(2)[1]
    picard = eqlx.FixedPointIteration(0.0, 1e-3)
    run = lambda s: eqlx.fixed_point(fn, s, jnp.zeros(2), throw=False)
    last, best = run(picard), run(eqlx.BestSoFar(picard))
    assert last.result == best.result == eqlx.RESULTS.nonfinite
    assert last.value[1] == 4
    assert best.value[1] == 2
    assert best.stats["residual"] == 2


def test_best_so_far_survives_a_map_without_a_finite_value():
    best = eqlx.BestSoFar(eqlx.Anderson(1e-6, 1e-6))
    sol = eqlx.fixed_point(lambda y, _: y * jnp.nan, best, jnp.ones(3), throw=False)
    assert sol.result == eqlx.RESULTS.nonfinite
    assert jnp.all(sol.value == 1)


def test_the_trace_is_the_residual_of_every_iterate():
    solver = eqlx.Traced(eqlx.FixedPointIteration(0.0, 1e-3))
    sol = eqlx.fixed_point(lambda y, _: 0.5 * y, solver, jnp.ones(2), max_steps=20)
    trace, k = sol.stats["trace"], int(sol.stats["num_steps"])
    assert trace.shape == (21,)
    assert jnp.allclose(trace[: k + 1], 0.5 ** (1 + jnp.arange(k + 1.0)))
    assert jnp.all(jnp.isnan(trace[k + 1 :]))
    assert trace[k] == sol.stats["residual"]


def test_wrappers_compose():
    solver = eqlx.Traced(eqlx.BestSoFar(eqlx.Anderson(0.0, 1e-10)))
    sol = eqlx.fixed_point(lambda y, _: jnp.cos(y), solver, jnp.ones(2))
    assert jnp.allclose(sol.value, 0.7390851332151607)
    num_seen = int(jnp.sum(jnp.isfinite(sol.stats["trace"])))
    assert num_seen == int(sol.stats["num_steps"]) + 1
