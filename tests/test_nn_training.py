"""What training adds: warm starts, tolerances and numbers of steps that change."""

# Some calls are wrong on purpose.
# pyright: reportArgumentType=false

import dataclasses
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest

from .helpers import Counted


_make = eqx.nn.make_with_state(eqlx.nn.WarmStart)


def _weight(layer: Any):
    return np.asarray(layer.cell.weight)


def test_the_second_epoch_saves_steps(getkey):
    cell = eqlx.nn.AffineCell(3, 6, key=getkey())
    layer = eqlx.nn.FixedPointLayer(cell, eqlx.FixedPointIteration(0.0, 1e-6))
    xs, ids = jr.normal(getkey(), (12, 3)), jnp.arange(12, dtype=jnp.int32)
    warm, state = _make(12, cell.init(xs[0]))

    @eqx.filter_jit
    def step(layer, state, xs, ids):
        def loss(layer):
            def one(x, i):
                return layer.solve(x, z0=warm.start(i, state, layer.cell.init(x)))

            sols = jax.vmap(one)(xs, ids)
            return jnp.mean(sols.value**2), (warm.keep(ids, sols.value, state), sols)

        grads, (state, sols) = eqx.filter_grad(loss, has_aux=True)(layer)
        cold = jax.vmap(layer.solve)(xs).stats["num_steps"]
        error = jax.vmap(layer.cell)(sols.value, xs) - sols.value
        layer = eqx.apply_updates(layer, jax.tree.map(lambda g: -1e-2 * g, grads))
        return layer, state, sols.stats["num_steps"], cold, error

    for epoch in range(3):
        steps, before = [], layer
        for batch in jnp.split(jr.permutation(getkey(), ids), 3):
            layer, state, warm_steps, cold_steps, error = step(
                layer, state, xs[batch], batch
            )
            steps.append((np.sum(warm_steps), np.sum(cold_steps)))
            assert np.all(np.abs(error) < 1e-6)
        saved = 1 - np.divide(*np.sum(steps, axis=0))
        # A tolerance of 1e-6 from a distance of one, or of 1e-2 after an epoch: four
        # digits in place of six.
        assert saved == 0 if epoch == 0 else saved > 0.2
        assert np.any(_weight(before) != _weight(layer))


def test_each_sample_finds_its_own_solution():
    like = {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}
    warm, state = _make(4, like)
    default = {"a": jnp.full(2, -1, jnp.float32)}
    numbers = jnp.arange(-1, 5, dtype=jnp.int32)
    start = jax.jit(
        lambda state: jax.vmap(lambda i: warm.start(i, state, default)["a"][0])(numbers)
    )
    assert np.array_equal(start(state), [-1] * 6)
    values = jnp.array([[3, 3], [2, 2], [9, 9], [8, 8], [1, jnp.nan]], jnp.float32)
    samples = jnp.array([3, 2, -1, 4, 0], jnp.int32)
    state = warm.keep(samples, {"a": values}, state)
    # Out of range, and not a number: left out.
    assert np.array_equal(start(state), [-1, -1, -1, 2, 3, -1])
    state = jax.jit(warm.keep)(samples[1:2], {"a": 10 * values[:1]}, state)
    assert np.array_equal(start(state), [-1, -1, -1, 30, 3, -1])


def test_what_is_kept_has_no_derivative():
    warm, state = _make(2, jnp.zeros(1))
    sample = jnp.array(1, jnp.int32)

    def through(z):
        kept = warm.keep(sample[None], z[None], state)
        return jnp.sum(warm.start(sample, kept, jnp.ones(1)))

    value, grad = jax.value_and_grad(through)(jnp.full(1, 7.0))
    assert (value, grad[0]) == (7, 0)


def test_a_schedule_does_not_compile_anew(getkey):
    # The error of half the distance a step is known in closed form.
    schedule = eqlx.nn.ToleranceSchedule(1e-2, 1e-8, 4)
    expected = [1e-2, 10**-3.5, 1e-5, 10**-6.5, 1e-8, 1e-8]
    cell = Counted(lambda z, x: 0.5 * z + x)
    layer = eqlx.nn.FixedPointLayer(cell, eqlx.FixedPointIteration(0.0, 1.0))

    @eqx.filter_jit
    def run(layer, step, x):
        solver = dataclasses.replace(layer.solver, atol=schedule(step))
        sol = dataclasses.replace(layer, solver=solver).solve(x)
        return solver.atol, sol.stats["num_steps"]

    traces = []
    for step, tolerance in enumerate(expected):
        got, num_steps = run(layer, jnp.array(step, jnp.int32), jnp.ones(2))
        assert np.isclose(got, tolerance, rtol=1e-6, atol=0)
        # The residual after k steps is 0.5^k.
        assert int(num_steps) == np.floor(-np.log2(tolerance)) + 1
        traces.append(len(cell.traces))
    assert len(set(traces)) == 1
    assert np.isclose(schedule(2), 1e-5)


def _layer(fn, solver, **kwargs):
    return eqlx.nn.FixedPointLayer(fn, solver, **kwargs)


@pytest.mark.parametrize("atol", [0.0, 1e-4])
@pytest.mark.parametrize(
    "batching", [eqlx.Staged(2, 1), eqlx.Lockstep(), eqlx.Vmapped()]
)
def test_a_number_of_steps_that_is_traced(atol, batching):
    cell = Counted(lambda z, x: 0.5 * z + x)
    inner = eqlx.FixedPointIteration(0.0, atol)

    @jax.jit
    def run(nums, xs):
        def one(num, x):
            solver = eqlx.UpTo(inner, num)
            layer = _layer(cell, solver, max_steps=30, batching=batching)
            sol = layer.solve(x, z0=jnp.zeros(1))
            return sol.value[0], sol.stats, sol.result == eqlx.RESULTS.successful

        return jax.vmap(one)(nums, xs)

    for nums in ([1, 2, 3, 5, 8, 13, 20, 40], [4, 4, 4, 4, 4, 4, 4, 4]):
        nums = np.array(nums)
        value, stats, is_successful = run(
            jnp.asarray(nums, jnp.int32), jnp.ones((8, 1))
        )
        # A tolerance of 1e-4 is reached after 14 halvings.
        taken = np.minimum(nums, 30 if atol == 0 else 14)
        assert np.array_equal(stats["num_steps"], taken)
        assert np.array_equal(stats["num_fn_evals"], taken + 1)
        assert np.allclose(value, 2 * (1 - 0.5**taken), rtol=1e-14, atol=0)
        assert np.array_equal(is_successful, (atol == 0) | (nums >= 14))
    once = len(cell.traces)
    run(jnp.full(8, 3, jnp.int32), jnp.ones((8, 1)))
    assert len(cell.traces) == once


def test_around_any_solver_and_adjoint(getkey):
    key = getkey()
    num = jr.randint(key, (), 3, 6)
    fn = lambda y, a: a * y + 1
    for solver in (
        eqlx.UpTo(eqlx.BestSoFar(eqlx.FixedPointIteration(0.0, 0.0)), num),
        eqlx.BestSoFar(eqlx.UpTo(eqlx.FixedPointIteration(0.0, 0.0), num)),
    ):
        run = lambda a, solver=solver: (
            eqlx.fixed_point(
                fn,
                solver,
                jnp.zeros(()),
                a,
                max_steps=10,
                adjoint=eqlx.RecursiveCheckpointAdjoint(),
            ).value
        )
        value, grad = jax.value_and_grad(run)(0.5)
        # 1 + a + a^2 + ..., to the power before the last step.
        powers = np.arange(int(num))
        assert np.isclose(value, np.sum(0.5**powers))
        assert np.isclose(grad, np.sum(powers * 0.5 ** (powers - 1.0)))


def test_a_penalty_on_a_layer(getkey):
    layer = _layer(eqlx.nn.AffineCell(3, 5, key=getkey()), eqlx.Anderson(0.0, 1e-10))
    x, key = jr.normal(getkey(), (3,)), getkey()
    fn, z0, args = layer.problem(x)
    assert not np.any(z0)
    z = layer(x)
    slopes = np.diag(1 - np.asarray(z) ** 2)
    jacobian = slopes @ _weight(layer)
    expected = np.max(np.abs(np.linalg.eigvals(jacobian)))
    assert np.isclose(eqlx.spectral_radius(fn, z, args, key=key), expected)

    @eqx.filter_jit
    def train(layer, key):
        def loss(layer):
            z = layer(x)
            fn, _, args = layer.problem(x)
            return eqlx.jacobian_penalty(fn, z, args, key=key, num_samples=4)

        value, grads = eqx.filter_value_and_grad(loss)(layer)
        return value, eqx.apply_updates(layer, jax.tree.map(lambda g: -0.5 * g, grads))

    penalties = []
    for k in jr.split(key, 30):
        value, layer = train(layer, k)
        penalties.append(float(value))
    assert np.mean(penalties[-5:]) < 0.3 * np.mean(penalties[:5])


@pytest.fixture
def _without_checked_types():
    """Users do not have the runtime type checks that the tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _keep(samples, solutions):
    warm, state = _make(3, jnp.zeros(2))
    return warm.keep(samples, solutions, state)


def _start(sample, default):
    warm, state = _make(3, jnp.zeros(2))
    return warm.start(sample, state, default)


_picard = eqlx.FixedPointIteration(0.0, 1e-3)
_ids = jnp.arange(2, dtype=jnp.int32)
_wrong_calls = [
    (_make, (0, jnp.zeros(2)), "`num_samples` .* at least 1; got 0"),
    (_make, (3, "z"), "`like` must be a tree .*got 'z'"),
    (_keep, (jnp.ones(2), jnp.ones((2, 2))), "`samples` must be a vector of int.*fl"),
    (_keep, (_ids[0], jnp.ones((2, 2))), r"`samples` must be a vector.*int32\[\]"),
    (_keep, (_ids, jnp.ones((3, 2))), r"`solutions` must have .*\(3,\s?2\)|\[3,2\]"),
    (_start, (_ids, jnp.ones(2)), r"`sample` must be one integer; got .*int32\[2\]"),
    (_start, (_ids[0], [jnp.ones(2)]), "`default` must have the structure"),
    (_start, (_ids[0], jnp.ones(2, jnp.float32)), "`default` .*float32"),
    (eqlx.UpTo, (3, 3), "`solver` must be an instance"),
    (eqlx.UpTo, (_picard, 0), "`num_steps` must be .* at least 1; got 0"),
    (eqlx.UpTo, (_picard, jnp.ones(())), r"`num_steps` must be one int.*float64\[\]"),
    (eqlx.UpTo, (_picard, _ids), r"`num_steps` must be one integer.*int32\[2\]"),
    (
        eqlx.nn.ToleranceSchedule,
        (0.0, 1.0, 3),
        "`first` must be positive.*got 0.0",
    ),
    (
        eqlx.nn.ToleranceSchedule,
        (1.0, -1.0, 3),
        "`last` must be positive.*got -1.0",
    ),
    (eqlx.nn.ToleranceSchedule, (1.0, 1.0, 0), "`num_steps` .*at least 1; got 0"),
]


@pytest.mark.usefixtures("_without_checked_types")
@pytest.mark.parametrize(("function", "args", "match"), _wrong_calls)
def test_wrong_calls(function, args, match):
    with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
        function(*args)
