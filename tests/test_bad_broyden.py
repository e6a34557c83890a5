"""Broyden's second method against its formula with a dense inverse."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from . import problems
from .helpers import is_successful, tanh_cell, tanh_problem


def _dense(fn, y, num_steps, history_length, inverse=None, num_updates=0):
    """Iterates and the last inverse by Broyden 1965, begun anew when it is full."""
    inverse = -np.eye(len(y)) if inverse is None else inverse
    g = fn(y) - y
    iterates = [y]
    for k in range(num_steps):
        step = -inverse @ g
        y = y + step
        iterates.append(y)
        change, g = fn(y) - y - g, fn(y) - y
        if num_updates == history_length:
            # What the last evaluation finds full is left as it is.
            if k < num_steps - 1:
                inverse, num_updates = -np.eye(len(y)), 0
            continue
        update = np.outer(step - inverse @ change, change) / (change @ change)
        inverse, num_updates = inverse + update, num_updates + 1
    return iterates, inverse


def _cell(getkey):
    w, x = tanh_problem(getkey(), 8, 0.9)
    x = 0.1 * x
    return (w, x), lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))


def _inverse(solver, state, size, transpose=False):
    """The matrix of `inverse_product`, column by column."""
    product = lambda e: solver.inverse_product(state, e, transpose=transpose)
    return np.asarray(jax.vmap(product, out_axes=1)(jnp.eye(size)))


@pytest.mark.parametrize("history_length", [1, 3, 20])
def test_iterates_and_inverses_are_those_of_the_dense_formula(getkey, history_length):
    args, fn = _cell(getkey)
    solver = eqlx.BadBroyden(0.0, 0.0, history_length=history_length)
    for max_steps in (1, 4, 5, 10):
        expected, inverse = _dense(fn, np.zeros(8), max_steps, history_length)
        sol = eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(8), args, max_steps=max_steps
        )
        first = np.max(np.abs(expected[1]))
        error = np.max(np.abs(sol.value - expected[max_steps]))
        assert error < 1e-9 * first, max_steps
        # The first step has no update; then so many, and one that begins anew. The
        # last of them is seen by the evaluation after `max_steps`.
        assert sol.stats["num_restarts"] == (max_steps - 1) // (history_length + 1)
        got = _inverse(solver, sol.state, 8)
        assert np.max(np.abs(got - inverse)) < 1e-6
        turned = _inverse(solver, sol.state, 8, transpose=True)
        assert np.max(np.abs(turned - inverse.T)) < 1e-6
        if max_steps > 1 and history_length > 1 and max_steps % 4 != 0:
            assert np.max(np.abs(got - got.T)) > 1e-3


def test_the_inverse_maps_the_last_change_of_the_residual_to_the_step(getkey):
    # Whatever the map is: a property of the update.
    args, fn = _cell(getkey)
    solver = eqlx.BadBroyden(0.0, 0.0)
    at = [
        eqlx.fixed_point(tanh_cell, solver, jnp.zeros(8), args, max_steps=num)
        for num in (5, 6)
    ]
    y, new_y = (np.asarray(sol.value) for sol in at)
    change = (fn(new_y) - new_y) - (fn(y) - y)
    got = solver.inverse_product(at[1].state, jnp.asarray(change))
    assert np.max(np.abs(got - (new_y - y))) < 1e-12 * np.max(np.abs(new_y))


def test_leaves_of_a_tree_are_one_vector(getkey):
    n = 6
    a = 0.9 * jnp.linalg.qr(jr.normal(getkey(), (n, n)))[0]
    b = jr.normal(getkey(), (n,))

    def split(y):
        return {"a": y[:2].reshape(2, 1), "b": (y[2], y[3:])}

    def fn(y, _):
        flat = jnp.concatenate([y["a"][:, 0], y["b"][0][None], y["b"][1]])
        return split(a @ flat + b)

    sol = eqlx.fixed_point(
        fn, eqlx.BadBroyden(0.0, 0.0), split(jnp.zeros(n)), max_steps=7
    )
    dense = lambda y: np.asarray(a) @ y + np.asarray(b)
    expected = split(jnp.asarray(_dense(dense, np.zeros(n), 7, 10)[0][-1]))
    for got, leaf in zip(
        jax.tree.leaves(sol.value), jax.tree.leaves(expected), strict=True
    ):
        assert np.allclose(got, leaf, rtol=1e-8, atol=1e-8)


def test_a_solve_goes_on_with_the_inverse_of_another(getkey):
    args, fn = _cell(getkey)
    solver = eqlx.BadBroyden(0.0, 0.0, history_length=6)
    old = eqlx.fixed_point(tanh_cell, solver, jnp.zeros(8), args, max_steps=4)
    _, inverse = _dense(fn, np.zeros(8), 4, 6)
    # From elsewhere: the first evaluation is no successor of the last one. The memory
    # holds four updates, has room for two, and then begins anew.
    start = jr.normal(getkey(), (8,))
    for max_steps in (1, 2, 3, 6):
        expected, _ = _dense(fn, np.asarray(start), max_steps, 6, inverse, 4)
        sol = eqlx.fixed_point(
            tanh_cell, solver, start, args, max_steps=max_steps, state=old.state
        )
        assert np.max(np.abs(sol.value - expected[-1])) < 1e-9
        assert sol.stats["num_restarts"] == int(max_steps > 3)


@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_the_history_of_a_finished_sample_is_kept(batching):
    def solve(rate):
        a = rate * jnp.array([[0.2, 0.1, 0.0], [0.0, 0.5, 0.3], [0.1, 0.0, -0.4]])
        return eqlx.fixed_point(
            lambda y, _: jnp.tanh(a @ y) + 1,
            eqlx.BadBroyden(0.0, 1e-12, history_length=4),
            jnp.zeros(3),
            batching=batching,
            throw=False,
        )

    rates = jnp.full(9, 0.05).at[4].set(1.5)
    sol = jax.jit(jax.vmap(solve))(rates)
    assert jnp.all(is_successful(sol))
    assert sol.stats["num_steps"][4] > sol.stats["num_steps"][0] + 4
    alone = jax.jit(solve)(rates[0])
    for got, leaf in zip(
        jax.tree.leaves(sol.state), jax.tree.leaves(alone.state), strict=True
    ):
        assert np.allclose(got[0], leaf, rtol=1e-6, atol=1e-15)


def test_a_map_that_stands_still_divides_by_no_zero():
    fn = lambda y, _: jnp.zeros(3) + 2.0
    sol = eqlx.fixed_point(fn, eqlx.BadBroyden(0.0, 0.0), jnp.zeros(3), max_steps=6)
    assert np.all(sol.value == 2)
    # A residual that does not change: no update, but a new start and a plain step.
    fn = lambda y, _: y + 1
    sol = eqlx.fixed_point(fn, eqlx.BadBroyden(0.0, 0.0), jnp.zeros(3), max_steps=6)
    assert np.all(sol.value == 6)
    assert sol.stats["num_restarts"] == 5


@pytest.mark.parametrize("exponent", [-60, 100])
def test_a_power_of_two_changes_no_digit_in_float32(getkey, exponent):
    a = 0.8 * jnp.linalg.qr(jr.normal(getkey(), (6, 6)))[0].astype(jnp.float32)
    b = jr.normal(getkey(), (6,), jnp.float32)
    scale = jnp.float32(2.0**exponent)
    run = lambda b: eqlx.fixed_point(
        lambda y, b: a @ y + b, eqlx.BadBroyden(1e-4, 0.0), 0 * b, b
    )
    unit, scaled = run(b), run(b * scale)
    assert np.array_equal(scaled.value, unit.value * scale)
    assert scaled.stats["num_steps"] == unit.stats["num_steps"]


def test_saves_steps_on_a_slow_map_with_room_for_its_history():
    problem = problems.make("tanh_100_0.9")
    solve = lambda solver: eqlx.fixed_point(
        problem.fn, solver, problem.y0, problem.args, max_steps=2000
    )
    sol = solve(eqlx.BadBroyden(0.0, 1e-9, history_length=30))
    plain = solve(eqlx.FixedPointIteration(0.0, 1e-9))
    assert 2 * sol.stats["num_steps"] < plain.stats["num_steps"]
    assert problems.error(problem, sol.value) < 1e-9 * problems.amplification(problem)


@pytest.mark.parametrize("history_length", [0, -1])
def test_a_history_without_room_is_refused(history_length):
    with pytest.raises(ValueError, match=r"`history_length` must be an integer"):
        eqlx.BadBroyden(0.0, 1e-3, history_length=history_length)
