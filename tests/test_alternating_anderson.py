"""Anderson's extrapolation every few steps, against dense algebra."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import (
    batch_reference,
    is_successful,
    relative_error,
    tanh_cell,
    tanh_problem,
)


def _by_hand(fn, y, num_steps, solver, rows=()):
    """Iterates, and how many steps were taken back.

    **Arguments:**

    - `rows`: Differences of `(y, f)` from those of the last evaluation of a solve
        before this one.
    """
    plain = lambda y, f: (1 - solver.damp) * f + solver.damp * y
    length = lambda y, f: np.max(np.abs(f - y))
    before: list = []
    iterates, is_trial, num_rejected = [y], False, 0
    for k in range(num_steps):
        f = fn(y)
        if is_trial and length(y, f) > solver.safeguard * length(*before[-1]):
            new, is_trial = plain(*before[-1]), False
            num_rejected += 1
        else:
            steps = [*rows, *((a - y, b - f) for a, b in before)]
            steps = steps[len(steps) - min(len(steps), solver.history_length) :]
            is_trial = (k + 1) % solver.period == 0 and len(steps) > 0
            new = plain(y, f)
            if is_trial:
                left = np.stack([b - a for a, b in steps], axis=1)
                weights, *_ = np.linalg.lstsq(left, f - y, rcond=None)
                for weight, step in zip(weights, steps, strict=True):
                    new = new - weight * plain(*step)
        before.append((y, f))
        y = new
        iterates.append(y)
    return iterates, num_rejected


def _solver(history_length=3, period=2, **options):
    options = {"ridge": 0.0, **options}
    return eqlx.AlternatingAnderson(
        0.0, 0.0, eqlx.max_norm, history_length, period, **options
    )


@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize(
    ("history_length", "period"),
    [(1, 1), (3, 1), (1, 2), (3, 2), (2, 3), (5, 3), (3, 5)],
)
def test_iterates_are_those_of_the_dense_algorithm(
    getkey, history_length, period, damp
):
    w, x = tanh_problem(getkey(), 8, 0.9)
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    solver = _solver(history_length, period, damp=damp)
    expected, num_rejected = _by_hand(fn, np.zeros(8), 11, solver)
    assert num_rejected == 0
    for num_steps in (1, 2, 3, 6, 11):
        sol = eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(8), (w, x), max_steps=num_steps
        )
        scale = np.max(np.abs(expected[num_steps]))
        assert np.max(np.abs(sol.value - expected[num_steps])) < 1e-7 * scale, num_steps
    assert all(x == 0 for x in jax.tree.leaves(sol.stats["rejections"]))


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize(("safeguard", "damp"), [(1.0, 0.0), (1.2, 0.3), (np.inf, 0.0)])
def test_iterates_with_and_without_a_step_back(safeguard, damp, period):
    # Nearly linear from afar, so that an extrapolation from there overshoots.
    shift = np.array([0.3, -0.1, 0.5])
    fn = lambda y, _: 0.9 * y + 0.6 * jnp.sin(3 * y) + shift
    by_numpy = lambda y: 0.9 * y + 0.6 * np.sin(3 * y) + shift
    solver = _solver(2, period, safeguard=safeguard, damp=damp)
    start = np.array([4.0, -2.0, 1.0])
    expected, num_rejected = _by_hand(by_numpy, start, 12, solver)
    for num_steps in (2, 5, 9, 12):
        sol = eqlx.fixed_point(fn, solver, jnp.asarray(start), max_steps=num_steps)
        assert np.allclose(sol.value, expected[num_steps], rtol=1e-6), num_steps
    rejections = sol.stats["rejections"]
    assert rejections.safeguard == num_rejected
    assert rejections.nonfinite == rejections.degenerate == 0
    assert (num_rejected > 0) == (np.isfinite(safeguard) and period < 3)


def _with_an_edge(y, limit):
    """The fixed point is 5; beyond `limit` there is no value."""
    image = jnp.minimum(0.97 * y + 0.9, 0.5 * y + 2.5)
    return jnp.where(y > limit, jnp.nan, image)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_trial_that_is_not_finite_is_taken_back(period):
    # Extrapolation from the first iterates goes far beyond 6; plain steps never leave
    # the interval. Of two samples one has such a limit.
    solver = eqlx.AlternatingAnderson(0.0, 1e-10, period=period)
    solve = lambda limit: eqlx.fixed_point(
        _with_an_edge, solver, jnp.ones(2), limit, max_steps=200
    )
    sol = jax.jit(jax.vmap(solve))(jnp.array([6.0, jnp.inf]))
    assert np.allclose(sol.value, 5, rtol=1e-9)
    rejections = sol.stats["rejections"]
    assert rejections.nonfinite[0] >= 1
    assert rejections.nonfinite[1] == 0
    # It is no part of the history, which stays of use.
    assert np.all(rejections.degenerate == 0)


def test_a_map_without_a_way_out_is_still_nonfinite():
    fn = lambda y, _: jnp.where(y > 3, jnp.nan, y + 1)
    sol = eqlx.fixed_point(
        fn, eqlx.AlternatingAnderson(0.0, 1e-10), jnp.zeros(2), throw=False
    )
    assert sol.result == eqlx.RESULTS.nonfinite
    assert sol.stats["num_steps"] <= 8


@pytest.mark.parametrize("gain", [0.9, 0.99])
def test_it_takes_fewer_steps_than_the_step_it_alternates_with(getkey, gain):
    # Symmetric, so that all that is slow is real.
    w = np.asarray(jr.normal(getkey(), (64, 64)))
    w = gain * (w + w.T) / np.linalg.norm(w + w.T, ord=2)
    args = (jnp.asarray(w), 0.1 * jr.normal(getkey(), (64,)))
    run = lambda solver: eqlx.fixed_point(
        tanh_cell, solver, jnp.zeros(64), args, max_steps=2000
    )
    ours, every = (
        run(eqlx.AlternatingAnderson(0.0, 1e-9)),
        run(eqlx.Anderson(0.0, 1e-9)),
    )
    bare = run(eqlx.FixedPointIteration(0.0, 1e-9))
    assert is_successful(ours)
    ours_took, every_took, bare_took = (
        int(sol.stats["num_steps"]) for sol in (ours, every, bare)
    )
    assert ours_took < 0.85 * every_took
    assert ours_took < 0.5 * bare_took
    y = np.zeros(64)
    for _ in range(4000):
        y = np.tanh(w @ y + np.asarray(args[1]))
    assert np.max(np.abs(ours.value - y)) < 1e-9 / (1 - gain)


@pytest.mark.parametrize("period", [2, 3])
def test_a_warm_start_knows_the_steps_of_the_solve_before(getkey, period):
    n = 6
    a = np.asarray(jr.normal(getkey(), (n, n))) / (2 * n**0.5)
    first, second = np.asarray(jr.normal(getkey(), (2, n)))
    fn = lambda y, b: jnp.asarray(a) @ y + b
    solver = _solver(4, period)
    # The ring has five places, and the last is neither its first nor its last.
    cold = eqlx.fixed_point(fn, solver, jnp.zeros(n), first, max_steps=7)
    iterates, _ = _by_hand(lambda y: a @ y + first, np.zeros(n), 7, solver)
    rows = [(y, a @ y + first) for y in iterates]
    # The last is evaluated too, to test it.
    rows = [(y - rows[-1][0], f - rows[-1][1]) for y, f in rows[-5:-1]]
    for num_steps in (1, 2, 3, 5):
        sol = eqlx.fixed_point(
            fn, solver, jnp.zeros(n), second, max_steps=num_steps, state=cold.state
        )
        expected, _ = _by_hand(
            lambda y: a @ y + second, np.zeros(n), num_steps, solver, rows
        )
        assert np.allclose(sol.value, expected[-1], rtol=1e-6, atol=1e-8), num_steps


@pytest.mark.parametrize("wrap", [lambda solver: solver, eqlx.Traced])
def test_the_default_adjoint_alternates_too(getkey, wrap):
    w = np.asarray(jr.normal(getkey(), (64, 64)))
    w = 0.95 * (w + w.T) / np.linalg.norm(w + w.T, ord=2)
    x, ct = 0.1 * jr.normal(getkey(), (64,)), jr.normal(getkey(), (64,))

    def run(solver, adjoint):
        sol = eqlx.fixed_point(
            tanh_cell, wrap(solver), jnp.zeros(64), (w, x), max_steps=2000
        )
        back = eqlx.solve_adjoint(
            tanh_cell, wrap(solver), sol.value, ct, (w, x), adjoint=adjoint
        )
        return sol.value, back.value, int(back.stats["num_steps"])

    linear = eqlx.FixedPointLinearSolver(eqlx.AlternatingAnderson(0.0, 1e-9))
    alternating, every = (
        solver(1e-9, 0.0, norm=eqlx.RelativeToNorm())
        for solver in (eqlx.AlternatingAnderson, eqlx.Anderson)
    )
    y, value, num_steps = run(alternating, eqlx.ImplicitAdjoint())
    _, _, explicit = run(alternating, eqlx.ImplicitAdjoint(linear))
    _, _, slower = run(every, eqlx.ImplicitAdjoint())
    assert num_steps == explicit
    assert num_steps < 0.85 * slower
    jacobian = (1 - np.asarray(y) ** 2)[:, None] * w
    exact = np.linalg.solve(np.eye(64) - jacobian.T, np.asarray(ct))
    assert np.max(np.abs(value - exact)) < 1e-7 * np.max(np.abs(exact))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_scale_of_a_problem_does_not_matter(getkey, scale):
    w = jr.normal(getkey(), (16, 16), jnp.float32)
    w = 0.95 * w / jnp.linalg.norm(w, ord=2)
    b = jr.normal(getkey(), (16,), jnp.float32)
    unit = jnp.asarray(scale, jnp.float32)
    solver = eqlx.AlternatingAnderson(1e-4, 0.0, norm=eqlx.RelativeToNorm())
    fn = lambda y, b: w @ y + b
    sol = eqlx.fixed_point(fn, solver, jnp.zeros(16, jnp.float32), unit * b)
    exact = np.linalg.solve(np.eye(16) - np.asarray(w, float), np.asarray(b, float))
    error = np.max(np.abs(np.asarray(sol.value, float) / scale - exact))
    assert error < 2e-3 * np.max(np.abs(exact))
    assert sol.stats["num_steps"] < 30


def test_one_branch_runs_in_a_batch_and_no_history_is_copied():
    def solve(y, args):
        return eqlx.fixed_point(
            tanh_cell,
            eqlx.AlternatingAnderson(0.0, 1e-9),
            y,
            args,
            batching=eqlx.Lockstep(),
            throw=False,
        ).value

    run = jax.jit(jax.vmap(solve, (0, (None, 0))))
    y = jnp.zeros((7, 11))
    text = run.lower(y, (jnp.zeros((11, 11)), y)).compile().as_text()
    assert text is not None
    lines = text.splitlines()
    assert sum("conditional(" in line for line in lines) == 1
    # The rings are `(7, 6, 11)`. That of zeros at the start may be made by a copy.
    rings = [x for x in lines if "= f64[7,6,11]" in x]
    assert any("dynamic-update-slice" in x for x in rings)
    assert all("broadcast" in x for x in rings if " copy(" in x)


def test_samples_that_count_their_own_steps_on_several_devices(getkey):
    w, _ = tanh_problem(getkey(), 5, 0.7)
    xs = jr.normal(getkey(), (8, 5))
    mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
    solver = eqlx.AlternatingAnderson(0.0, 1e-12)

    def one(x, w):
        return eqlx.fixed_point(
            tanh_cell,
            solver,
            jnp.zeros_like(x),
            (w, x),
            throw=False,
            batching=eqlx.Vmapped(),
        ).value

    def local(w, xs):
        return jax.lax.psum(jnp.sum(jax.vmap(one, (0, None))(xs, w)), "b")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("b")), out_specs=P())
    value, grads = jax.jit(jax.value_and_grad(run, (0, 1)))(w, xs)
    zs, *expected = batch_reference(w, xs)
    assert relative_error(value, jnp.sum(zs)) < 1e-9
    for got, true in zip(grads, expected, strict=True):
        assert relative_error(got, true) < 1e-8


@pytest.mark.parametrize("period", [0, -1])
def test_a_period_below_one_is_refused(period):
    with pytest.raises(ValueError, match=r"`period` must be an integer"):
        eqlx.AlternatingAnderson(0.0, 0.0, period=period)
