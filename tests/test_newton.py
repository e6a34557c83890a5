"""Newton's method and Newton-Krylov: convergence far off, singular starts, counts."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from .helpers import is_successful, newton, tanh_cell, tanh_problem


methods = pytest.mark.parametrize("method", [eqlx.Newton, eqlx.NewtonKrylov])


def test_newton_iterates_are_those_of_the_dense_formula(getkey):
    args = tanh_problem(getkey(), 7, 0.95)
    z = np.zeros(7)
    for max_steps in (1, 2, 3):
        jacobian = np.asarray(jax.jacfwd(tanh_cell)(jnp.asarray(z), args))
        residual = np.asarray(tanh_cell(jnp.asarray(z), args)) - z
        z = z + np.linalg.solve(np.eye(7) - jacobian, residual)
        sol = eqlx.fixed_point(
            tanh_cell, eqlx.Newton(0.0, 0.0), jnp.zeros(7), args, max_steps=max_steps
        )
        assert np.allclose(sol.value, z, rtol=1e-12, atol=1e-14)
        # A linearisation and seven products a step, besides the iterates.
        assert sol.stats["num_fn_evals"] == 1 + 9 * max_steps


@pytest.mark.parametrize(
    "linear_solver",
    [
        None,
        lx.LU(),
        lx.QR(),
        lx.SVD(),
        lx.GMRES(1e-12, 1e-12),
        lx.AutoLinearSolver(True),
    ],
)
def test_newton_takes_any_linear_solver(getkey, linear_solver):
    args = tanh_problem(getkey(), 6, 0.9)
    solver = eqlx.Newton(0.0, 1e-12, linear_solver=linear_solver)
    sol = eqlx.fixed_point(tanh_cell, solver, jnp.zeros(6), args)
    expected = newton(tanh_cell, jnp.zeros(6), args)
    assert np.max(np.abs(sol.value - expected)) < 1e-10
    assert sol.stats["num_steps"] <= 6


def test_newton_hands_tags_to_its_linear_solver():
    # I - J is diagonal and positive.
    rates = jnp.array([0.5, -3.0, 0.9])
    solver = eqlx.Newton(
        0.0,
        1e-12,
        linear_solver=lx.Cholesky(),
        tags=frozenset({lx.positive_semidefinite_tag}),
    )
    sol = eqlx.fixed_point(lambda y, _: rates * y + 1, solver, jnp.zeros(3))
    assert sol.stats["num_steps"] == 1
    assert np.allclose(sol.value, 1 / (1 - rates), rtol=1e-12)


@methods
def test_converges_quadratically_or_nearly_so(method):
    fn = lambda y, _: jnp.cos(y)
    errors = []
    for max_steps in (1, 2, 3):
        sol = eqlx.fixed_point(
            fn, method(0.0, 0.0), jnp.array([1.0, 0.5]), max_steps=max_steps
        )
        errors.append(float(np.max(np.abs(sol.value - 0.7390851332151607))))
    assert errors[1] < errors[0] ** 1.5
    assert errors[2] < max(errors[1] ** 1.5, 1e-15)


@methods
def test_a_far_start_does_not_fly_off(method):
    # Newton's method for atan(x) = 0 diverges from beyond 1.39.
    fn = lambda y, _: y - jnp.arctan(y)
    for start in (3.0, 20.0, -1.5):
        run = lambda solver, y0=start: eqlx.fixed_point(
            fn, solver, jnp.array([y0]), throw=False
        )
        full = run(method(0.0, 1e-10, line_search=eqlx.FullStep()))
        assert not is_successful(full)
        sol = run(method(0.0, 1e-10))
        assert is_successful(sol)
        assert np.max(np.abs(sol.value)) < 1e-9
        assert sol.stats["num_shortened"] > 0


@methods
def test_a_trial_that_is_not_finite_is_taken_back(method):
    # From 0.01 the full step goes to a negative number, of which there is no logarithm.
    fn = lambda y, _: y - (jnp.log(y) - 1)
    start = jnp.array([20.0])
    expected = np.e
    assert start - (np.log(20.0) - 1) * 20 < 0
    full = eqlx.fixed_point(
        fn, method(0.0, 1e-10, line_search=eqlx.FullStep()), start, throw=False
    )
    assert full.result == eqlx.RESULTS.nonfinite
    sol = eqlx.fixed_point(fn, method(0.0, 1e-10), start)
    assert np.allclose(sol.value, expected, rtol=1e-9)


def test_a_trial_of_broyden_that_is_not_finite_is_shortened():
    # The first step leads from 20 to a negative number.
    fn = lambda y, _: y - 12 * (jnp.log(y) - 1)
    solver = eqlx.Broyden(0.0, 1e-10, line_search=eqlx.Backtracking(growth=1.0))
    start = jnp.array([20.0, 25.0])
    full = eqlx.fixed_point(fn, eqlx.Broyden(0.0, 1e-10), start, throw=False)
    assert full.result == eqlx.RESULTS.nonfinite
    one = eqlx.fixed_point(fn, solver, start, max_steps=2, throw=False)
    half = np.asarray(start) - 6 * (np.log(np.asarray(start)) - 1)
    assert np.allclose(one.value, half)
    sol = eqlx.fixed_point(fn, solver, start)
    assert np.allclose(sol.value, np.e, rtol=1e-9)


@methods
def test_a_singular_start_is_left_by_a_plain_step(method):
    # d/dy of y - fn is zero at the first element's start.
    fn = lambda y, c: y + 0.3 * (y * y - c)
    sol = eqlx.fixed_point(
        fn,
        method(0.0, 1e-10),
        jnp.array([0.0, 1.5]),
        jnp.array([2.0, 2.0]),
        throw=False,
    )
    if is_successful(sol):
        assert np.allclose(np.abs(sol.value), 2**0.5, rtol=1e-8)
    assert np.all(np.isfinite(sol.value))
    assert method is not eqlx.Newton or is_successful(sol)


def test_newton_krylov_takes_no_more_products_than_the_forcing_asks(getkey):
    # A linear map: each step solves to a tenth of the residual before it, or better.
    n = 40
    a = 0.9 * jnp.linalg.qr(jr.normal(getkey(), (n, n)))[0]
    b = jr.normal(getkey(), (n,))
    fn = lambda y, _: a @ y + b
    run = lambda **k: eqlx.fixed_point(
        fn, eqlx.NewtonKrylov(0.0, 1e-9, **k), jnp.zeros(n), throw=False
    )
    loose, tight = run(max_forcing=0.1), run(max_forcing=1e-12, restart=n)
    expected = np.linalg.solve(np.eye(n) - np.asarray(a), np.asarray(b))
    for sol in (loose, tight):
        assert is_successful(sol)
        assert np.max(np.abs(sol.value - expected)) < 1e-7
    assert tight.stats["num_steps"] == 1
    assert tight.stats["num_fn_evals"] <= n + 3
    assert 1 < loose.stats["num_steps"] <= 10


def test_newton_krylov_solves_what_contracts_for_no_one(getkey):
    # The tridiagonal system (-1, 10, -1) with a weak nonlinearity (NLsolve's report).
    n = 2000

    def fn(y, _):
        left, right = jnp.roll(y, 1).at[0].set(0), jnp.roll(y, -1).at[-1].set(0)
        return y - (10 * y - left - right + 0.1 * jnp.tanh(y) - 1)

    sol = eqlx.fixed_point(fn, eqlx.NewtonKrylov(0.0, 1e-9), jnp.zeros(n))
    y = np.zeros(n)
    for _ in range(20):
        padded = np.concatenate([[0], y, [0]])
        y = (1 + padded[:-2] + padded[2:] - 0.1 * np.tanh(y)) / 10
    assert np.max(np.abs(sol.value - y)) < 1e-9
    assert sol.stats["num_fn_evals"] < 40


@methods
def test_a_batch_in_which_samples_search_and_others_do_not(method):
    fn = lambda y, _: y - jnp.arctan(y)
    starts = jnp.linspace(-20.0, 20.0, 9)
    solve = lambda s: eqlx.fixed_point(fn, method(0.0, 1e-10), s[None], throw=False)
    sol = jax.jit(jax.vmap(solve))(starts)
    assert np.max(np.abs(sol.value)) < 1e-9
    assert sol.stats["num_shortened"][0] > 0
    assert sol.stats["num_shortened"][4] == 0
    for i in (0, 3, 4):
        alone = solve(starts[i])
        assert alone.stats["num_steps"] == sol.stats["num_steps"][i]
        assert alone.stats["num_fn_evals"] == sol.stats["num_fn_evals"][i]


@methods
def test_what_is_not_possible_is_told(method):
    with pytest.raises(ValueError, match=f"`solver={method.__name__}`.*`batch_axis`"):
        eqlx.fixed_point(
            lambda y, _: 0.5 * y, method(0.0, 1e-6), jnp.zeros((3, 2)), batch_axis=0
        )

    def loss(c):
        return eqlx.fixed_point(
            lambda y, c: c * jnp.cos(y),
            method(0.0, 1e-6),
            jnp.zeros(2),
            c,
            adjoint=eqlx.RecursiveCheckpointAdjoint(),
        ).value.sum()

    with pytest.raises(ValueError, match="Newton's method cannot be differentiated"):
        jax.grad(loss)(jnp.array(0.5))


@pytest.mark.parametrize("search", [eqlx.Backtracking(growth=1.0), eqlx.FullStep()])
def test_broyden_with_a_line_search_is_its_formula(getkey, search):
    # With steps of other lengths than one, against the dense update.
    a = jr.normal(getkey(), (5, 5)) * 0.3 - 2.5 * jnp.eye(5)
    fn = lambda y, _: jnp.tanh(a @ y + jnp.arange(5.0) - 2)
    solver = eqlx.Broyden(0.0, 0.0, history_length=30, line_search=search)
    inverse, y, length = -np.eye(5), np.zeros(5), 1.0
    value = lambda y: np.asarray(fn(jnp.asarray(y), None)) - y
    norm = lambda g: np.max(np.abs(g))
    g, iterates, num = value(y), [y], 0
    while len(iterates) <= 12:
        direction, length = -inverse @ g, 1.0
        while True:
            new = y + length * direction
            iterates.append(new)
            new_g = value(new)
            k = len(iterates) - 1
            if isinstance(search, eqlx.FullStep) or length <= 1e-3:
                break
            if norm(new_g) <= (1 + 1 / (k + 1) ** 2 - 1e-4 * length) * norm(g):
                break
            length, num = length / 2, num + 1
        step, change = new - y, new_g - g
        moved = inverse @ change
        inverse = inverse + np.outer(step - moved, step @ inverse) / (step @ moved)
        y, g = new, new_g
    for max_steps in (3, 6, 12):
        sol = eqlx.fixed_point(fn, solver, jnp.zeros(5), max_steps=max_steps)
        assert np.allclose(sol.value, iterates[max_steps], rtol=1e-6, atol=1e-9)
    assert (num > 0) == isinstance(search, eqlx.Backtracking)
