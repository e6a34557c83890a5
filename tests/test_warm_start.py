"""Going on from the state of an earlier solve."""

import functools as ft

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import every_solver, is_successful, newton, tanh_cell, tanh_problem


_learners = {
    "anderson": eqlx.Anderson(0.0, 1e-10, history_length=8),
    "broyden": eqlx.Broyden(0.0, 1e-10, history_length=40),
    "broyden_searching": eqlx.Broyden(
        0.0, 1e-10, history_length=40, line_search=eqlx.Backtracking(growth=1.0)
    ),
    "traced": eqlx.Traced(eqlx.Anderson(0.0, 1e-10, history_length=8)),
    "best_so_far": eqlx.BestSoFar(eqlx.Broyden(0.0, 1e-10, history_length=40)),
}
learners = pytest.mark.parametrize("name", list(_learners))


def _cell(getkey, size=12):
    w, x = tanh_problem(getkey(), size, 0.95)
    return w, 0.1 * x


def _solve(name, args, start=None, **kwargs):
    start = jnp.zeros(args[1].shape) if start is None else start
    return eqlx.fixed_point(
        tanh_cell, _learners[name], start, args, throw=False, **kwargs
    )


@learners
def test_a_neighbouring_problem_takes_fewer_steps_with_the_state(getkey, name):
    w, x = _cell(getkey)
    first = _solve(name, (w, x))
    near = x + 0.01 * jr.normal(getkey(), x.shape)
    warm = _solve(name, (w, near), first.value)
    warmer = _solve(name, (w, near), first.value, state=first.state)
    expected = newton(tanh_cell, jnp.zeros(12), (w, near))
    for sol in (warm, warmer):
        assert is_successful(sol)
        assert np.max(np.abs(sol.value - expected)) < 1e-8
    assert 4 * warmer.stats["num_steps"] <= 3 * warm.stats["num_steps"]


@learners
def test_an_interrupted_solve_goes_on(getkey, name):
    args = _cell(getkey)
    whole = _solve(name, args)
    half = _solve(name, args, max_steps=10)
    assert not is_successful(half)
    rest = _solve(name, args, half.value, state=half.state)
    cold = _solve(name, args, half.value)
    assert is_successful(rest)
    total = 10 + rest.stats["num_steps"]
    # It goes on from the best iterate, not the last, and without the last difference.
    assert total <= whole.stats["num_steps"] + 5
    assert rest.stats["num_steps"] < cold.stats["num_steps"]


@pytest.mark.parametrize("num", [0, 1, 3, 8, 11])
def test_anderson_ends_a_linear_solve_whenever_it_was_interrupted(getkey, num):
    # All differences that it has seen are valid for a linear map, so with room for all
    # it needs n + 1 in total, and one more for the one that an interruption costs.
    n = 6
    a = jr.normal(getkey(), (n, n)) / (2 * n**0.5)
    b = jr.normal(getkey(), (n,))
    fn = lambda y, _: a @ y + b
    solver = eqlx.Anderson(0.0, 1e-9, history_length=n, ridge=0.0)
    init = eqlx.fixed_point(
        fn, solver, jnp.zeros(n), max_steps=max(num, 1), throw=False
    )
    sol = eqlx.fixed_point(fn, solver, init.value, state=init.state, throw=False)
    expected = np.linalg.solve(np.eye(n) - np.asarray(a), np.asarray(b))
    assert np.max(np.abs(sol.value - expected)) < 1e-7
    assert sol.stats["num_steps"] <= max(n + 2 - num, 0) + 1


def test_the_inverse_of_broyden_is_the_dense_one(getkey):
    w, x = _cell(getkey, 6)
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    solver = eqlx.Broyden(0.0, 0.0, history_length=20)
    # The dense formula, with the step that would come next as the last pair's.
    inverse, y = -np.eye(6), np.zeros(6)
    g = fn(y) - y
    for num in range(1, 8):
        step = -inverse @ g
        y = y + step
        change, g = fn(y) - y - g, fn(y) - y
        moved = inverse @ change
        inverse = inverse + np.outer(step - moved, step @ inverse) / (step @ moved)
        if num not in (1, 4, 7):
            continue
        sol = eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(6), (w, x), max_steps=num, throw=False
        )
        for transpose, expected in ((False, inverse), (True, inverse.T)):
            product = ft.partial(solver.inverse_product, sol.state, transpose=transpose)
            got = jax.vmap(product, out_axes=1)(jnp.eye(6))
            assert np.allclose(got, expected, rtol=1e-7, atol=1e-8)


def test_the_last_evaluation_takes_nothing_from_a_full_history(getkey):
    # Of four directions in a history of four there are three updates.
    w, x = _cell(getkey, 6)
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    solver = eqlx.Broyden(0.0, 0.0, history_length=4)
    sol = eqlx.fixed_point(
        tanh_cell, solver, jnp.zeros(6), (w, x), max_steps=4, throw=False
    )
    inverse, y = -np.eye(6), np.zeros(6)
    g = fn(y) - y
    for _ in range(3):
        step = -inverse @ g
        y = y + step
        change, g = fn(y) - y - g, fn(y) - y
        moved = inverse @ change
        inverse = inverse + np.outer(step - moved, step @ inverse) / (step @ moved)
    product = ft.partial(solver.inverse_product, sol.state)
    got = jax.vmap(product, out_axes=1)(jnp.eye(6))
    assert np.allclose(got, inverse, rtol=1e-7, atol=1e-8)
    again = eqlx.fixed_point(
        tanh_cell, solver, sol.value, (w, x), max_steps=1, throw=False, state=sol.state
    )
    value = np.asarray(sol.value)
    expected = value - inverse @ (fn(value) - value)
    assert np.allclose(again.value, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", list(every_solver(0.0, 0.0)))
def test_every_solver_takes_its_own_state_back(getkey, name):
    args = _cell(getkey, 5)
    solver = every_solver(0.0, 1e-10)[name]
    solve = lambda z, **k: eqlx.fixed_point(tanh_cell, solver, z, args, **k)
    sol = solve(jnp.zeros(5))
    again = solve(sol.value, state=sol.state)
    assert is_successful(again)
    assert again.stats["num_steps"] == 0
    moved = solve(sol.value + 0.01, state=sol.state)
    expected = newton(tanh_cell, jnp.zeros(5), args)
    assert np.max(np.abs(moved.value - expected)) < 1e-8


@learners
def test_a_state_from_a_solve_that_met_not_a_number_harms_no_other(getkey, name):
    args = _cell(getkey)
    bad = _solve(name, (args[0], args[1] * jnp.nan))
    assert bad.result == eqlx.RESULTS.nonfinite
    cold = _solve(name, args)
    sol = _solve(name, args, state=bad.state)
    assert is_successful(sol)
    assert sol.stats["num_steps"] <= cold.stats["num_steps"] + 1


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_states_of_a_batch_in_a_scan(getkey, name):
    # Frames that drift: each solve starts from the last, with what that one learnt.
    w, x = _cell(getkey)
    starts = x[None] + 0.1 * jr.normal(getkey(), (5, 12))
    drift = 0.003 * jr.normal(getkey(), (6, 5, 12))
    solve = jax.vmap(lambda x, z, state: _solve(name, (w, x), z, state=state))
    first = jax.vmap(lambda x: _solve(name, (w, x)))(starts)

    def frame(carry, move):
        xs, zs, state = carry
        sol = solve(xs + move, zs, state)
        return (xs + move, sol.value, sol.state), sol.stats["num_steps"]

    (xs, zs, _), steps = jax.jit(
        lambda: jax.lax.scan(frame, (starts, first.value, first.state), drift)
    )()
    for x, z in zip(xs, zs, strict=True):
        assert np.max(np.abs(z - newton(tanh_cell, jnp.zeros(12), (w, x)))) < 1e-8
    assert np.mean(steps) < 0.8 * np.mean(first.stats["num_steps"])


def test_the_derivative_in_a_state_is_zero(getkey):
    args = _cell(getkey, 4)

    def value(scale):
        sol = _solve("anderson", args, max_steps=3)
        state = jax.tree.map(
            lambda s: s * scale if jnp.issubdtype(s.dtype, jnp.floating) else s,
            sol.state,
        )
        return _solve("anderson", args, state=state).value.sum()

    assert jax.grad(value)(jnp.array(1.0)) == 0


def test_with_a_batch_axis(getkey):
    w, x = _cell(getkey)
    xs = x[None] + 0.1 * jr.normal(getkey(), (4, 12))
    fn = lambda z, xs: jnp.tanh(z @ w.T + xs)
    solve = lambda z, xs, **k: eqlx.fixed_point(
        fn, _learners["anderson"], z, xs, batch_axis=0, **k
    )
    first = solve(0 * xs, xs)
    near = xs + 0.01 * jr.normal(getkey(), xs.shape)
    warm = solve(first.value, near)
    warmer = solve(first.value, near, state=first.state)
    assert np.all(warmer.stats["num_steps"] < warm.stats["num_steps"])
    for x, z in zip(near, warmer.value, strict=True):
        assert np.max(np.abs(z - newton(tanh_cell, jnp.zeros(12), (w, x)))) < 1e-8


@pytest.mark.parametrize(
    "state",
    [3.0, jnp.zeros(2), eqlx.Broyden(0.0, 1e-6).init(jnp.zeros(4), max_steps=5)],
)
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="`state` must be the `Solution.state`"):
        eqlx.fixed_point(
            lambda y, _: jnp.cos(y), eqlx.Anderson(0.0, 1e-6), jnp.ones(4), state=state
        )


def test_a_state_of_another_size_is_refused():
    solve = lambda y, m, **k: eqlx.fixed_point(
        lambda y, _: jnp.cos(y), eqlx.Anderson(0.0, 1e-6, history_length=m), y, **k
    )
    sol = solve(jnp.ones(4), 5)
    for y, m in ((jnp.ones(5), 5), (jnp.ones(4), 4)):
        with pytest.raises(ValueError, match="`state` must be the `Solution.state`"):
            solve(y, m, state=sol.state)
