"""Stabilised type-I Anderson acceleration against dense algebra and published runs."""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax._solver.base import Evaluation

from .helpers import is_successful, tanh_cell, tanh_problem


def _dense(fn, y, num_steps, solver):
    """Iterates, restarts and rejections, with the estimate of I - J as a matrix."""
    size = len(y)
    b, rows, places = np.eye(size), [], 0
    is_trial, restarts, rejections = False, 0, 0
    iterates, last = [y], (y, y, np.inf)
    for k in range(num_steps):
        g = fn(y) - y
        norm = np.max(np.abs(g))
        is_rejected = is_trial and not norm <= solver.safeguard * last[2]
        rejections += is_rejected
        if k > 0:
            s = y - last[0]
            is_secant = np.all(np.isfinite(g)) and (is_trial or not rows)
            if places == solver.history_length:
                b, rows, places, restarts = np.eye(size), [], 0, restarts + 1
            if is_secant:
                new = s - sum(((r @ s) / (r @ r) * r for r in rows), np.zeros(size))
                if np.linalg.norm(new) < solver.independence * np.linalg.norm(s):
                    b, rows, places, restarts = np.eye(size), [], 0, restarts + 1
                    new = s
                gamma = new @ np.linalg.solve(b, last[1] - g) / (new @ new)
                theta, bound = 1.0, solver.regularisation
                if abs(gamma) < bound:
                    theta = (1 - np.copysign(bound, gamma)) / (1 - gamma)
                image = theta * (last[1] - g) + (1 - theta) * (b @ s)
                b = b + np.outer(image - b @ s, new) / (new @ new)
                rows.append(new)
            places += 1
        last = last if is_rejected else (y, g, norm)
        is_trial = not is_rejected and len(rows) > 0
        step = np.linalg.solve(b, last[1]) if is_trial else (1 - solver.damp) * last[1]
        y = last[0] + step
        iterates.append(y)
    return iterates, restarts, rejections


def _compare(cell, fn, args, start, solver, nums):
    restarts = rejections = 0
    for num in nums:
        expected, restarts, rejections = _dense(fn, np.asarray(start), num, solver)
        sol = eqlx.fixed_point(cell, solver, start, args, max_steps=num)
        size = np.max(np.abs(expected[-1]))
        assert np.max(np.abs(sol.value - expected[-1])) < 1e-7 * size, num
        assert sol.stats["num_restarts"] == restarts
        assert sum(jax.tree.leaves(sol.stats["rejections"])) == rejections
    return restarts, rejections


@pytest.mark.parametrize(
    ("history_length", "damp"), [(1, 0.0), (3, 0.0), (3, 0.3), (20, 0.3)]
)
def test_iterates_are_those_of_the_dense_algorithm(getkey, history_length, damp):
    w, x = tanh_problem(getkey(), 8, 0.9)
    x = 0.1 * x
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    solver = eqlx.AndersonTypeI(0.0, 0.0, history_length=history_length, damp=damp)
    restarts, _ = _compare(tanh_cell, fn, (w, x), jnp.zeros(8), solver, (1, 3, 9))
    # The first step fills a place, and the last is seen by the evaluation after it.
    assert restarts == {1: 7, 3: 2, 20: 0}[history_length]


def test_steps_are_taken_back_as_in_the_dense_algorithm(getkey):
    # Not normal: accelerated steps raise the residual.
    a = 0.7 * np.eye(6) + np.eye(6, k=1)
    b = np.asarray(jr.normal(getkey(), (6,)))
    solver = eqlx.AndersonTypeI(0.0, 0.0, history_length=4, safeguard=1.0)
    fn = lambda y: a @ y + b
    cell = lambda y, args: args[0] @ y + args[1]
    args = (jnp.asarray(a), jnp.asarray(b))
    restarts, rejections = _compare(cell, fn, args, jnp.zeros(6), solver, (4, 8, 13))
    assert restarts > 1
    assert rejections > 1


def test_a_symmetric_map_is_solved_as_by_conjugate_gradients(getkey):
    # Walker and Ni 2011, of type I: the map applied to the iterates of Arnoldi's
    # method, which are those of Hestenes and Stiefel here.
    n = 10
    q = np.linalg.qr(np.asarray(jr.normal(getkey(), (n, n))))[0]
    a = (q * np.linspace(-0.9, 0.8, n)) @ q.T
    rhs = np.asarray(jr.normal(getkey(), (n,)))
    matrix = np.eye(n) - a
    x, r = np.zeros(n), rhs
    p = r
    solver = eqlx.AndersonTypeI(0.0, 0.0, history_length=n, safeguard=float("inf"))
    for k in range(8):
        if k in (1, 4, 7):
            fn = lambda y, _: jnp.asarray(a) @ y + rhs
            sol = eqlx.fixed_point(fn, solver, jnp.zeros(n), max_steps=k + 1)
            expected = a @ x + rhs
            error = np.linalg.norm(sol.value - expected)
            assert error < 1e-8 * np.linalg.norm(expected), k
        alpha = (r @ r) / (p @ matrix @ p)
        x, new = x + alpha * p, r - alpha * matrix @ p
        r, p = new, new + (new @ new) / (r @ r) * p


@pytest.mark.parametrize("history_length", [6, 12])
def test_a_linear_map_of_n_unknowns_ends_in_n_plus_one_steps(getkey, history_length):
    n = 6
    a = jr.normal(getkey(), (n, n)) / (2 * n**0.5)
    b = jr.normal(getkey(), (n,))
    solver = eqlx.AndersonTypeI(0.0, 1e-9, history_length=history_length)
    sol = eqlx.fixed_point(lambda y, _: a @ y + b, solver, jnp.zeros(n))
    assert sol.stats["num_steps"] <= n + 1
    expected = np.linalg.solve(np.eye(n) - a, b)
    assert np.max(np.abs(sol.value - expected)) < 1e-8


@pytest.mark.parametrize("rate", [0.995, 1.005, 0.95, 3.0])
def test_the_estimate_keeps_away_from_singular(rate):
    # In one dimension: the slope of y - f is held off zero, on its own side.
    slope = 1 - rate
    held = np.copysign(max(abs(slope), 0.01), slope)
    sol = eqlx.fixed_point(
        lambda y, _: rate * y + 1,
        eqlx.AndersonTypeI(0.0, 0.0),
        jnp.zeros(1),
        max_steps=2,
    )
    assert np.allclose(sol.value, 1 + rate / held, rtol=1e-10)
    exact = eqlx.AndersonTypeI(0.0, 0.0, regularisation=0.0)
    sol = eqlx.fixed_point(lambda y, _: rate * y + 1, exact, jnp.zeros(1), max_steps=2)
    assert np.allclose(sol.value, 1 / slope, rtol=1e-10)


def test_a_step_with_nothing_new_begins_the_memory_anew():
    # All steps are along one line, of which the first says everything for a linear map
    # but not for this one.
    fn = lambda y, _: 0.5 * jnp.cos(jnp.sum(y)) * jnp.array([1.0, 2.0])
    sol = eqlx.fixed_point(fn, eqlx.AndersonTypeI(0.0, 1e-12), jnp.array([0.2, 0.4]))
    assert is_successful(sol)
    # Each step after the first two, up to the last.
    assert sol.stats["num_restarts"] == sol.stats["num_steps"] - 2
    # The length t along (1, 2): t = cos(3 t) / 2, by bisection.
    low, high = 0.0, 1.0
    for _ in range(60):
        mid = (low + high) / 2
        low, high = (mid, high) if mid < np.cos(3 * mid) / 2 else (low, mid)
    assert np.allclose(sol.value, [low, 2 * low], rtol=1e-11)


@pytest.mark.parametrize("far", [float("nan"), float("inf"), -1e6])
def test_a_step_into_the_unknown_is_taken_back(far):
    # The first slope points to 10, beyond where the map makes sense.
    def fn(y, _):
        inside = jnp.where(y < 2, 0.9 * y + 1, 0.5 * y + 1.8)
        return jnp.where(y > 7, far, inside)

    sol = eqlx.fixed_point(fn, eqlx.AndersonTypeI(0.0, 1e-10), jnp.zeros(1))
    assert is_successful(sol)
    assert np.allclose(sol.value, 3.6, rtol=1e-9)
    causes = sol.stats["rejections"]
    expected, other = causes.nonfinite, causes.safeguard
    if np.isfinite(far):
        expected, other = other, expected
    assert expected >= 2
    assert other == 0


def test_an_accelerated_step_needs_a_residual_that_a_sum_can_bear():
    # Evaluations by hand: at 0 with a residual of 1, and at 1 with one of a million.
    solver = eqlx.AndersonTypeI(0.0, 0.0, safeguard=float("inf"))
    zero, yes = jnp.zeros((), jnp.int32), jnp.array(True)

    def at(y, residual, num):
        y, g = jnp.array([y]), jnp.array([residual])
        size, flags = jnp.abs(g[0]), (yes, yes, jnp.array(False), yes)
        return Evaluation(y, y + g, size, size, size, y, size, zero + num, *flags)

    fn = lambda y, _: y  # Not used.

    def second(residual):
        state = solver.init(jnp.zeros(1), max_steps=9)
        state = solver.step(fn, at(0.0, 1.0, 0), None, state).state
        return solver.step(fn, at(1.0, residual, 1), None, state)

    step = second(-0.99e6)
    assert step.is_trial
    # The line through both residuals.
    assert np.allclose(step.y, 1 / 0.99e6, rtol=1e-5)
    step = second(-1.01e6)
    assert not step.is_trial
    assert np.allclose(step.y, 1 - 1.01e6)


def _elastic_net(key, num_rows, num_columns):
    """A fit with penalties, by ISTA with a step just inside of its bound."""
    a_key, x_key, s_key, n_key = jr.split(key, 4)
    a = jr.normal(a_key, (num_rows, num_columns))
    is_zero = jnp.arange(num_columns) >= num_columns // 10
    truth = jr.permutation(s_key, jnp.where(is_zero, 0, 1.0))
    truth = truth * jr.normal(x_key, (num_columns,))
    b = a @ truth + 0.1 * jr.normal(n_key, (num_rows,))
    mu = 1e-3 * jnp.max(jnp.abs(a.T @ b))
    rate = 1.8 / (jnp.linalg.norm(a, ord=2) ** 2 + mu / 2)

    def fn(y, _):
        moved = y - rate * (a.T @ (a @ y - b) + mu / 2 * y)
        return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - rate * mu / 2, 0)

    # At the minimum the gradient of the smooth part is within the other's.
    def slack(y):
        gradient = a.T @ (a @ y - b) + mu / 2 * y
        at_kink = jnp.maximum(jnp.abs(gradient) - mu / 2, 0)
        return jnp.where(y == 0, at_kink, jnp.abs(gradient + mu / 2 * jnp.sign(y)))

    return fn, lambda y: float(jnp.max(slack(y)) / mu), num_columns


def _decisions(key, num_states, num_actions):
    """Value iteration of a random Markov decision process, discount 0.99."""
    m_key, w_key, r_key, g_key = jr.split(key, 4)
    shape = (num_actions, num_states, num_states)
    sparse = lambda key, rate, x: jnp.where(jr.bernoulli(key, rate, x.shape), x, 0)
    moves = sparse(m_key, 3 / num_states, jr.uniform(w_key, shape))
    moves = moves + 1e-3 * jnp.eye(num_states)[None]
    moves = moves / moves.sum(-1, keepdims=True)
    rewards = sparse(g_key, 0.03, jr.normal(r_key, shape[:2]))
    fn = lambda y, _: jnp.max(rewards + 0.99 * moves @ y, axis=0)
    return fn, num_states


def _reduce(fn, solver, size, key, ratio, max_steps):
    """Solve for a residual that is smaller by a ratio."""
    start = jr.normal(key, (size,))
    start = start / jnp.linalg.norm(start)
    target = ratio * eqlx.two_norm(fn(start, None) - start)
    solver = eqx.tree_at(lambda s: s.atol, solver, target)
    return eqlx.fixed_point(fn, solver, start, max_steps=max_steps, throw=False)


def test_value_iteration_is_accelerated_as_published(getkey):
    # Of 300 states and 200 actions there: 23 to 31 steps instead of 1,222.
    fn, size = _decisions(getkey(), 60, 20)
    key = getkey()
    solver = eqlx.AndersonTypeI(0.0, 0.0, norm=eqlx.two_norm)
    sol = _reduce(fn, solver, size, key, 1e-5, 3000)
    plain = eqlx.FixedPointIteration(0.0, 0.0, norm=eqlx.two_norm)
    slow = _reduce(fn, plain, size, key, 1e-5, 3000)
    assert is_successful(sol)
    assert is_successful(slow)
    assert slow.stats["num_steps"] > 1000
    assert sol.stats["num_steps"] < 120
    # A contraction by 0.99 in the maximum norm, from either.
    bound = 100 * (sol.stats["residual"] + slow.stats["residual"])
    assert jnp.max(jnp.abs(sol.value - slow.value)) < bound


def test_an_elastic_net_is_solved_as_published(getkey):
    # Of 500 equations for 1,000 unknowns there: 490 to 640 steps, where the plain
    # iteration has come to 4e-4 after 1,000.
    fn, slack, size = _elastic_net(getkey(), 100, 200)
    key = getkey()
    solver = eqlx.AndersonTypeI(0.0, 0.0, norm=eqlx.two_norm)
    sol = _reduce(fn, solver, size, key, 1e-8, 1000)
    assert is_successful(sol)
    assert slack(sol.value) < 1e-4
    plain = eqlx.FixedPointIteration(0.0, 0.0, norm=eqlx.two_norm)
    slow = _reduce(fn, plain, size, key, 1e-5, 1000)
    assert not is_successful(slow)
    # A safeguard that lets no residual grow stalls.
    tight = eqlx.AndersonTypeI(0.0, 0.0, norm=eqlx.two_norm, safeguard=1.0)
    stalled = _reduce(fn, tight, size, key, 1e-5, 1000)
    assert not is_successful(stalled)
    assert stalled.stats["rejections"].safeguard > 300


def test_a_solve_goes_on_with_the_memory_of_another(getkey):
    # The Jacobian of a linear map is known after n steps, whatever is added to it.
    n = 4
    a = 0.9 * jnp.linalg.qr(jr.normal(getkey(), (n, n)))[0]
    solver = eqlx.AndersonTypeI(0.0, 1e-9)
    fn = lambda y, b: a @ y + b
    # Of six evaluations the last finds nothing new, and leaves the memory as it is.
    old = eqlx.fixed_point(fn, solver, jnp.zeros(n), jr.normal(getkey(), (n,)))
    assert old.stats["num_steps"] == n + 1
    b = jr.normal(getkey(), (n,))
    # From elsewhere: the first evaluation is no successor of the last one.
    start = 100 + jr.normal(getkey(), (n,))
    sol = eqlx.fixed_point(fn, solver, start, b, state=old.state)
    assert sol.stats["num_steps"] == 1
    expected = np.linalg.solve(np.eye(n) - np.asarray(a), np.asarray(b))
    assert np.max(np.abs(sol.value - expected)) < 1e-8


@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_the_memory_of_a_finished_sample_is_kept(batching):
    def solve(rate):
        a = rate * jnp.array([[0.2, 0.1, 0.0], [0.0, 0.5, 0.3], [0.1, 0.0, -0.4]])
        return eqlx.fixed_point(
            lambda y, _: jnp.tanh(a @ y) + 1,
            eqlx.AndersonTypeI(0.0, 1e-11, history_length=3),
            jnp.zeros(3),
            batching=batching,
            throw=False,
        )

    rates = jnp.full(9, 0.05).at[4].set(1.5)
    sol = jax.jit(jax.vmap(solve))(rates)
    assert jnp.all(is_successful(sol))
    assert sol.stats["num_steps"][4] > sol.stats["num_steps"][0] + 3
    alone = jax.jit(solve)(rates[0])
    for got, leaf in zip(
        jax.tree.leaves(sol.state), jax.tree.leaves(alone.state), strict=True
    ):
        # Rows at the end are differences of what has all but converged.
        assert np.allclose(got[0], leaf, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("exponent", [-60, 100])
def test_a_power_of_two_changes_no_digit_in_float32(getkey, exponent):
    a = 0.8 * jnp.linalg.qr(jr.normal(getkey(), (6, 6)))[0].astype(jnp.float32)
    b = jr.normal(getkey(), (6,), jnp.float32)
    scale = jnp.float32(2.0**exponent)
    run = lambda b: eqlx.fixed_point(
        lambda y, b: a @ y + b, eqlx.AndersonTypeI(1e-4, 0.0), 0 * b, b
    )
    unit, scaled = run(b), run(b * scale)
    assert np.array_equal(scaled.value, unit.value * scale)
    assert scaled.stats["num_steps"] == unit.stats["num_steps"]


def test_a_map_that_stands_still_divides_by_no_zero():
    fn = lambda y, _: jnp.zeros(3) + 2.0
    sol = eqlx.fixed_point(fn, eqlx.AndersonTypeI(0.0, 0.0), jnp.zeros(3), max_steps=9)
    assert np.all(sol.value == 2)
    # A residual that does not change is a slope of zero, and held off it.
    fn = lambda y, _: y + 1
    sol = eqlx.fixed_point(fn, eqlx.AndersonTypeI(0.0, 0.0), jnp.zeros(1), max_steps=2)
    assert np.allclose(sol.value, 1 + 100)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("history_length", 0),
        ("damp", 1.0),
        ("regularisation", 1.0),
        ("independence", -0.1),
        ("safeguard", 0.5),
    ],
)
def test_knobs_outside_of_their_range_are_refused(knob, value):
    with pytest.raises(ValueError, match=f"`{knob}` must be"):
        eqlx.AndersonTypeI(0.0, 1e-3, **{knob: value})
