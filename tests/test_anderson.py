"""Anderson's safeguard: what it takes back, and what it counts."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .helpers import is_successful


def _by_hand(fn, y, num_steps, m, safeguard, damp):
    """Type II by dense least squares, with the step back: iterates and rejections."""
    iterates, d_g, d_f = [y], [], []
    base: list = []
    is_trial, num_rejected = False, 0
    for _ in range(num_steps):
        f = fn(y)
        g = f - y
        if base:
            d_g.append(g - base[0])
            d_f.append(f - base[1])
            d_g, d_f = d_g[-m:], d_f[-m:]
        if is_trial and np.max(np.abs(g)) > safeguard * np.max(np.abs(base[0])):
            y, is_trial, num_rejected = (
                base[1] - damp * base[0],
                False,
                num_rejected + 1,
            )
        else:
            base = [g, f]
            y = f - damp * g
            if d_g:
                left = np.stack(d_g, axis=1)
                weights, *_ = np.linalg.lstsq(left, g, rcond=None)
                y = y - (np.stack(d_f, axis=1) - damp * left) @ weights
            is_trial = bool(d_g)
        iterates.append(y)
    return iterates, num_rejected


def _bumpy(y):
    """Nearly linear from afar, so that an extrapolation from there overshoots."""
    return 0.9 * y + 0.6 * np.sin(3 * y) + np.array([0.3, -0.1, 0.5])


@pytest.mark.parametrize(("safeguard", "damp"), [(1.0, 0.0), (1.2, 0.3), (np.inf, 0.0)])
def test_iterates_with_and_without_a_step_back(safeguard, damp):
    fn = lambda y, _: 0.9 * y + 0.6 * jnp.sin(3 * y) + jnp.array([0.3, -0.1, 0.5])
    options = {"ridge": 0.0, "safeguard": safeguard, "damp": damp}
    solver = eqlx.Anderson(0.0, 0.0, history_length=2, **options)
    start = np.array([4.0, -2.0, 1.0])
    iterates, num_rejected = _by_hand(_bumpy, start, 9, 2, safeguard, damp)
    for max_steps in (2, 5, 9):
        sol = eqlx.fixed_point(fn, solver, jnp.asarray(start), max_steps=max_steps)
        assert np.allclose(sol.value, iterates[max_steps], rtol=1e-7), max_steps
    rejections = sol.stats["rejections"]
    assert rejections.safeguard == num_rejected
    assert rejections.nonfinite == rejections.degenerate == 0
    assert (num_rejected > 0) == np.isfinite(safeguard)


def test_a_trial_that_is_not_finite_is_taken_back():
    # Extrapolation from 1 and 1.9 goes far beyond 6, where the map has no value; the
    # plain iteration never leaves the interval.
    def fn(y, _):
        return jnp.where(y > 6, jnp.nan, jnp.minimum(0.97 * y + 0.9, 0.5 * y + 2.5))

    sol = eqlx.fixed_point(fn, eqlx.Anderson(0.0, 1e-10), jnp.ones(2), max_steps=100)
    assert np.allclose(sol.value, 5, rtol=1e-9)
    assert sol.stats["rejections"].nonfinite >= 1
    # It is no part of the history, which stays of use.
    assert sol.stats["rejections"].degenerate == 0


def test_a_map_without_a_way_out_is_still_nonfinite():
    fn = lambda y, _: jnp.where(y > 3, jnp.nan, y + 1)
    sol = eqlx.fixed_point(fn, eqlx.Anderson(0.0, 1e-10), jnp.zeros(2), throw=False)
    assert sol.result == eqlx.RESULTS.nonfinite
    assert sol.stats["num_steps"] <= 5


def test_counts_are_those_of_each_sample():
    def fn(y, limit):
        image = jnp.minimum(0.97 * y + 0.9, 0.5 * y + 2.5)
        return jnp.where(y > limit, jnp.nan, image)

    solve = lambda limit: eqlx.fixed_point(
        fn, eqlx.Anderson(0.0, 1e-10), jnp.ones(2), limit
    )
    limits = jnp.array([6.0, jnp.inf])
    sol = jax.jit(jax.vmap(solve))(limits)
    assert np.allclose(sol.value, 5)
    assert sol.stats["rejections"].nonfinite.shape == (2,)
    assert sol.stats["rejections"].nonfinite[0] >= 1
    assert sol.stats["rejections"].nonfinite[1] == 0


def test_no_step_is_counted_where_all_goes_well():
    rates = jnp.linspace(-0.5, 0.5, 4)
    sol = eqlx.fixed_point(
        lambda y, _: rates * y + 1, eqlx.Anderson(0.0, 1e-11), jnp.zeros(4)
    )
    assert is_successful(sol)
    assert all(int(x) == 0 for x in jax.tree.leaves(sol.stats["rejections"]))


@pytest.mark.parametrize("safeguard", [0.5, -1.0, 0.0])
def test_a_safeguard_below_one_is_refused(safeguard):
    with pytest.raises(ValueError, match=r"`safeguard` must be at least 1\.0; got"):
        eqlx.Anderson(0.0, 1e-6, safeguard=safeguard)
