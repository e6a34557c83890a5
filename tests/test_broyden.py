"""Broyden's method against its formula with a dense inverse."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from . import problems
from .helpers import tanh_cell, tanh_problem


def _dense(fn, y, num_steps, history_length):
    """Iterates by Broyden 1965 with a dense inverse, begun anew when it is full."""
    inverse, num_updates = -np.eye(len(y)), 0
    g = fn(y) - y
    iterates = [y]
    for _ in range(num_steps):
        step = -inverse @ g
        y = y + step
        iterates.append(y)
        change, g = fn(y) - y - g, fn(y) - y
        if num_updates == history_length:
            inverse, num_updates = -np.eye(len(y)), 0
            continue
        moved = inverse @ change
        update = np.outer(step - moved, step @ inverse) / (step @ moved)
        inverse, num_updates = inverse + update, num_updates + 1
    return iterates


@pytest.mark.parametrize("history_length", [1, 3, 20])
def test_iterates_are_those_of_the_dense_formula(getkey, history_length):
    w, x = tanh_problem(getkey(), 8, 0.9)
    x = 0.1 * x
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    solver = eqlx.Broyden(0.0, 0.0, history_length=history_length)
    run = jax.jit(
        lambda max_steps: eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(8), (w, x), max_steps=max_steps
        ),
        static_argnums=0,
    )
    expected = _dense(fn, np.zeros(8), 10, history_length)
    for max_steps in (1, 2, 4, 5, 10):
        sol = run(max_steps)
        first = np.max(np.abs(expected[1]))
        error = np.max(np.abs(sol.value - expected[max_steps]))
        assert error < 1e-9 * first, max_steps
        # The first step has no update; then so many, and one that begins anew.
        restarts = (max_steps - 1) // (history_length + 1)
        assert sol.stats["num_restarts"] == restarts


def test_a_linear_map_of_n_unknowns_ends_in_2n_steps(getkey):
    n = 6
    a = jr.normal(getkey(), (n, n)) / n**0.5
    b = jr.normal(getkey(), (n,))
    solver = eqlx.Broyden(0.0, 1e-8, history_length=2 * n)
    sol = eqlx.fixed_point(lambda y, _: a @ y + b, solver, jnp.zeros(n))
    expected = np.linalg.solve(np.eye(n) - np.asarray(a), np.asarray(b))
    assert sol.stats["num_steps"] <= 2 * n
    assert sol.stats["num_restarts"] == 0
    assert np.max(np.abs(sol.value - expected)) < 1e-6


def test_goes_on_learning_after_a_new_start():
    problem = problems.make("tanh_300_0.99")
    solve = lambda solver: (
        eqlx.fixed_point(
            problem.fn, solver, problem.y0, problem.args, max_steps=2000
        ).stats
    )
    stats = solve(eqlx.Broyden(0.0, 1e-9))
    plain = solve(eqlx.FixedPointIteration(0.0, 1e-9))
    assert stats["num_restarts"] > 3
    assert 2 * stats["num_steps"] < plain["num_steps"]


def test_leaves_of_a_tree_are_one_vector(getkey):
    # A low-rank update for each leaf alone would not see how they depend on each other.
    n = 6
    a = 0.9 * jnp.linalg.qr(jr.normal(getkey(), (n, n)))[0]
    b = jr.normal(getkey(), (n,))

    def split(y):
        return {"a": y[:2].reshape(2, 1), "b": (y[2], y[3:])}

    def fn(y, _):
        flat = jnp.concatenate([y["a"][:, 0], y["b"][0][None], y["b"][1]])
        return split(a @ flat + b)

    solver = eqlx.Broyden(0.0, 0.0, history_length=20)
    sol = eqlx.fixed_point(fn, solver, split(jnp.zeros(n)), max_steps=7)
    dense = lambda y: np.asarray(a) @ y + np.asarray(b)
    expected = split(jnp.asarray(_dense(dense, np.zeros(n), 7, 20)[-1]))
    for got, leaf in zip(
        jax.tree.leaves(sol.value), jax.tree.leaves(expected), strict=True
    ):
        assert np.allclose(got, leaf, rtol=1e-8, atol=1e-8)


def test_a_map_that_stands_still_restarts_nothing_and_divides_by_no_zero():
    fn = lambda y, _: jnp.zeros(3) + 2.0
    sol = eqlx.fixed_point(fn, eqlx.Broyden(0.0, 0.0), jnp.zeros(3), max_steps=6)
    assert np.allclose(sol.value, 2)


@pytest.mark.parametrize("solver", [eqlx.Broyden, eqlx.Anderson])
@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_the_history_of_a_finished_sample_is_kept(solver, batching):
    # While others go on it would be overwritten, for a lack of change by zeros.
    def solve(rate):
        a = rate * jnp.array([[0.2, 0.1, 0.0], [0.0, 0.5, 0.3], [0.1, 0.0, -0.4]])
        return eqlx.fixed_point(
            lambda y, _: jnp.tanh(a @ y) + 1,
            solver(0.0, 1e-12, history_length=2),
            jnp.zeros(3),
            batching=batching,
            throw=False,
        )

    rates = jnp.full(9, 0.05).at[4].set(1.5)
    sol = jax.jit(jax.vmap(solve))(rates)
    steps = sol.stats["num_steps"]
    assert steps[4] > steps[0] + 4
    state = sol.state
    history = state.factors.rows if solver is eqlx.Broyden else state.d_images
    assert jnp.all(jnp.any(history != 0, axis=(1, 2)))
