"""A layer that is solved by the kernels of its cell, forward and backward."""

import functools as ft
from typing import Any, cast

import equilax as eqlx
import equilax._fused as fused
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax import nn, RESULTS
from equilax_kernels.affine_fixed_point import tpu, triton
from equilax_kernels.affine_fixed_point.triton_plan import Plan
from jax.sharding import AxisType, PartitionSpec as P

from ..helpers import optimised_hlo, relative_error


_D, _IN, _ROWS = 6, 3, 5
_PICARD = eqlx.FixedPointIteration(0.0, 1e-6)
_ANDERSON = eqlx.Anderson(0.0, 1e-6, history_length=3)


@pytest.fixture
def by_kernel(monkeypatch):
    """Has layers solved by the kernel of a name; returns what was asked for."""
    asked = []

    def take(name):
        def on_platform(reference, kernels):
            del reference
            asked.append(set(kernels))
            return kernels[name]()

        monkeypatch.setattr(fused, "on_platform", on_platform)

    interpreted = {
        tpu: {"tile": 8, "interpret": True},
        triton: {"plan": Plan(4, 4, 8), "interpret": True},
    }
    for module, options in interpreted.items():
        run = ft.partial(module.affine_fixed_point, **options)
        monkeypatch.setattr(module, "affine_fixed_point", run)
    # A trace of an earlier test would be taken for one of this.
    jax.clear_caches()
    yield take, asked
    jax.clear_caches()


def _layer(key, solver: Any = _PICARD, activation: Any = jnp.tanh, gain=0.6, **options):
    cell: Any = nn.AffineCell(_IN, _D, activation, dtype=jnp.float32, key=key)
    weight = gain * cell.weight / jnp.linalg.norm(cell.weight, 2)
    cell = eqx.tree_at(lambda c: c.weight, cell, weight.astype(jnp.float32))
    return nn.FixedPointLayer(cell, solver, **options)


def _numbers(layer):
    cell = layer.cell
    return tuple(np.asarray(x, np.float64) for x in (cell.weight, cell.injection))


_SLOPES = {
    jnp.tanh: lambda x: 1 - np.tanh(x) ** 2,
    jax.nn.relu: lambda x: (x > 0).astype(float),
    jax.nn.identity: np.ones_like,
}
_VALUES = {
    jnp.tanh: np.tanh,
    jax.nn.relu: lambda x: np.maximum(x, 0),
    jax.nn.identity: lambda x: x,
}


def _solution(layer, xs):
    weight, injection = _numbers(layer)
    xs, activation = np.asarray(xs, np.float64), _VALUES[layer.cell.activation]
    z = np.zeros((len(xs), _D))
    for _ in range(500):
        z = activation(z @ weight.T + xs @ injection.T)
    return z


def _gradient(layer, xs, ct):
    """Of the weights and the inputs, by a dense inverse."""
    weight, injection = _numbers(layer)
    z = _solution(layer, xs)
    slopes = _SLOPES[layer.cell.activation](z @ weight.T + np.asarray(xs) @ injection.T)
    of_weight, of_xs = np.zeros_like(weight), []
    for row, slope, c in zip(z, slopes, np.asarray(ct, np.float64), strict=True):
        adjoint = np.linalg.solve(np.eye(_D) - (slope[:, None] * weight).T, c)
        of_weight += np.outer(slope * adjoint, row)
        of_xs.append(injection.T @ (slope * adjoint))
    return of_weight, np.stack(of_xs)


def _pull_back(layer, xs, ct):
    def loss(layer, xs):
        return jnp.sum(ct * jax.vmap(layer)(xs))

    return eqx.filter_jit(eqx.filter_grad(lambda args: loss(*args)))((layer, xs))


def _inputs(getkey, num=_ROWS):
    xs = jr.normal(getkey(), (num, _IN), jnp.float32)
    return xs, jr.normal(getkey(), (num, _D), jnp.float32)


@pytest.mark.parametrize(
    ("name", "solver", "activation"),
    [
        ("tpu", _PICARD, jnp.tanh),
        ("tpu", _ANDERSON, jax.nn.relu),
        ("triton", _PICARD, jax.nn.identity),
        ("triton", _ANDERSON, jnp.tanh),
    ],
)
def test_value_and_gradient(getkey, by_kernel, name, solver, activation):
    take, asked = by_kernel
    take(name)
    layer, (xs, ct) = _layer(getkey(), solver, activation), _inputs(getkey)
    sol = eqx.filter_jit(eqx.filter_vmap(layer.solve))(xs)
    assert relative_error(sol.value, _solution(layer, xs)) < 2e-5
    assert jnp.all(sol.result == RESULTS.successful)
    assert jnp.all(sol.stats["residual"] < 1e-6)
    assert jnp.all(sol.stats["num_fn_evals"] == sol.stats["num_steps"] + 1)
    if solver is _ANDERSON:  # Not counted is not none.
        assert jnp.all(sol.stats["rejections"].safeguard == -1)
    (of_layer, of_xs), weight = _pull_back(layer, xs, ct), _gradient(layer, xs, ct)
    assert relative_error(of_layer.cell.weight, weight[0]) < 5e-5
    assert relative_error(of_xs, weight[1]) < 5e-5
    # The forward pass twice, its adjoint once.
    assert asked == [{"tpu", "triton"}] * 3


def test_each_sample_ends_by_itself(getkey, by_kernel):
    by_kernel[0]("tpu")
    layer = _layer(getkey(), max_steps=12, gain=0.95, activation=jax.nn.identity)
    xs, _ = _inputs(getkey, 4)
    xs = xs.at[1].set(jnp.nan).at[2].set(0.0)
    sol = eqx.filter_jit(eqx.filter_vmap(layer.solve))(xs)
    expected = (
        RESULTS.max_steps_reached,
        RESULTS.nonfinite,
        RESULTS.successful,
        RESULTS.max_steps_reached,
    )
    for k, item in enumerate(expected):
        assert jax.tree.map(lambda x, k=k: x[k], sol.result) == item
    assert sol.stats["num_steps"].tolist() == [12, 0, 0, 12]
    alone = layer.solve(xs[0])
    assert np.array_equal(alone.value, sol.value[0])


def test_divergence_and_a_failed_adjoint(getkey, by_kernel):
    by_kernel[0]("triton")
    # Two times a rotation: no solver of one step gets anywhere.
    turn = jnp.asarray([[0.0, -2.0], [2.0, 0.0]], jnp.float32)
    cell = nn.AffineCell(_IN, 2, jax.nn.identity, dtype=jnp.float32, key=getkey())
    cell = eqx.tree_at(lambda c: c.weight, cell, turn)
    alone = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_PICARD))
    layer = nn.FixedPointLayer(cell, _PICARD, adjoint=alone)
    x = jnp.ones(_IN, jnp.float32)
    assert layer.solve(x).result == RESULTS.divergence
    z = jnp.zeros(2, jnp.float32)
    sol = layer.solve_adjoint(x, z, jnp.ones(2, jnp.float32))
    assert sol.result == RESULTS.divergence
    assert not sol.stats["is_usable"]
    # GMRES needs no contraction.
    both = eqlx.FallbackLinearSolver(eqlx.FixedPointLinearSolver(_PICARD))
    layer = nn.FixedPointLayer(cell, _PICARD, adjoint=eqlx.ImplicitAdjoint(both))
    sol = layer.solve_adjoint(x, z, jnp.ones(2, jnp.float32))
    expected = np.linalg.solve(np.eye(2) - np.asarray(turn).T, np.ones(2))
    assert sol.stats["is_fallback"]
    assert relative_error(sol.value, expected) < 1e-5


def test_a_monitor_hears_of_the_adjoint(getkey, by_kernel):
    by_kernel[0]("tpu")
    layer, (xs, ct) = _layer(getkey(), _ANDERSON), _inputs(getkey)

    def loss(monitor):
        return jnp.sum(ct * jax.vmap(lambda x: layer(x, monitor=monitor))(xs))

    seen = jax.jit(jax.grad(loss))(eqlx.AdjointMonitor())
    assert seen.num_solves == _ROWS
    assert seen.num_failed == 0
    assert seen.num_steps >= 2 * _ROWS


def test_second_order(getkey, by_kernel):
    take, asked = by_kernel
    take("tpu")
    layer, (xs, ct) = _layer(getkey()), _inputs(getkey, 2)
    inner = lambda xs: jnp.sum(ct * jax.vmap(layer)(xs))
    got = jax.jit(jax.grad(lambda xs: jnp.sum(jax.grad(inner)(xs) ** 2)))(xs)
    norm = lambda xs: np.sum(_gradient(layer, xs, ct)[1] ** 2)
    expected, step = np.zeros(xs.shape), 1e-5
    at = np.asarray(xs, np.float64)
    for index in np.ndindex(xs.shape):
        shift = np.zeros(xs.shape)
        shift[index] = step
        expected[index] = (norm(at + shift) - norm(at - shift)) / (2 * step)
    assert relative_error(got, expected) < 1e-3
    assert len(asked) >= 2


def test_a_tangent_is_that_of_the_solution(getkey, by_kernel):
    by_kernel[0]("tpu")
    layer, (xs, _) = _layer(getkey()), _inputs(getkey, 2)
    tangent = jnp.ones_like(xs)
    push = jax.jit(lambda x, t: jax.jvp(jax.vmap(layer), (x,), (t,))[1])
    got = np.asarray(push(xs, tangent))
    for k, row in enumerate(np.eye(2)):
        for j in range(_D):
            ct = np.outer(row, np.eye(_D)[j])
            expected = np.sum(_gradient(layer, xs, ct)[1])
            assert abs(got[k, j] - expected) < 5e-5


def test_batches_within_batches(getkey, by_kernel):
    by_kernel[0]("tpu")
    layer, (xs, _) = _layer(getkey()), _inputs(getkey, 6)
    nested = jax.jit(jax.vmap(jax.vmap(layer)))(xs.reshape(2, 3, _IN))
    assert relative_error(nested.reshape(6, _D), _solution(layer, xs)) < 2e-5


def test_an_ensemble_has_no_kernel_and_needs_none(getkey, by_kernel):
    by_kernel[0]("triton")
    layers = [_layer(getkey()), _layer(getkey())]
    xs, _ = _inputs(getkey, 3)
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *layers
    )
    run = eqx.filter_vmap(
        lambda layer, xs: jax.vmap(layer)(xs), in_axes=(eqx.if_array(0), None)
    )
    for got, layer in zip(run(stacked, xs), layers, strict=True):
        assert relative_error(got, _solution(layer, xs)) < 2e-5


def test_in_shard_map(getkey, by_kernel):
    by_kernel[0]("tpu")
    layer, (xs, ct) = _layer(getkey(), _ANDERSON), _inputs(getkey, 8)
    mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))

    def of_weight(weight, xs, ct):
        cell = eqx.tree_at(lambda c: c.weight, layer.cell, weight)
        whole = eqx.tree_at(lambda m: m.cell, layer, cell)
        return jnp.sum(ct * jax.vmap(whole)(xs))

    run = jax.shard_map(
        jax.grad(of_weight), mesh=mesh, in_specs=(P(), P("b"), P("b")), out_specs=P()
    )
    got = jax.jit(run)(cast(nn.AffineCell, layer.cell).weight, xs, ct)
    assert relative_error(got, _gradient(layer, xs, ct)[0]) < 5e-5


@pytest.mark.parametrize(
    "other",
    [
        {"solver": eqlx.Broyden(0.0, 1e-6)},
        {"solver": eqlx.FixedPointIteration(0.0, 1e-6, eqlx.rms_norm)},
        {"solver": eqlx.Anderson(0.0, 1e-6, history_length=9)},
        {"activation": jnp.sin},
        {"fuse": False},
        {"adjoint": eqlx.RecursiveCheckpointAdjoint()},
    ],
    ids=["solver", "norm", "history", "activation", "asked not to", "adjoint"],
)
def test_what_has_no_kernel(getkey, by_kernel, other):
    take, asked = by_kernel
    take("tpu")
    layer = _layer(getkey(), **other)
    x = jnp.ones(_IN, jnp.float32)
    z = layer(x)
    assert asked == []
    weight, injection = _numbers(layer)
    image = cast(nn.AffineCell, layer.cell).activation(
        weight @ np.asarray(z) + injection @ np.ones(_IN)
    )
    assert np.allclose(image, z, atol=1e-5)


def test_what_goes_on_from_an_earlier_solve_has_no_kernel(getkey, by_kernel):
    take, asked = by_kernel
    take("tpu")
    layer, x = _layer(getkey(), _ANDERSON), jnp.ones(_IN, jnp.float32)
    sol = layer.solve(x)
    assert len(asked) == 1
    again = layer.solve(x, z0=sol.value, state=sol.state)
    assert len(asked) == 1
    assert again.result == RESULTS.successful


def test_double_precision_has_no_kernel(getkey, by_kernel):
    take, asked = by_kernel
    take("tpu")
    cell = nn.AffineCell(_IN, _D, key=getkey())
    assert nn.FixedPointLayer(cell, _PICARD)(jnp.ones(_IN)).dtype == jnp.float64
    assert asked == []


def _loss(layer, xs):
    return jnp.sum(jax.vmap(layer)(xs) ** 2)


def test_on_a_cpu_nothing_is_left_of_it(getkey):
    xs, _ = _inputs(getkey)
    grad = lambda is_fused: jax.grad(
        ft.partial(_loss, _layer(jr.key(0), _ANDERSON, fuse=is_fused))
    )
    texts = [optimised_hlo(grad(is_fused), xs) for is_fused in (True, False)]
    counts = [
        [t.count(f" {op}(") for op in ("while", "conditional", "custom-call", "fusion")]
        for t in texts
    ]
    assert counts[0] == counts[1]
    assert counts[0][2] == 0


def test_what_an_exported_program_holds(getkey):
    layer, (xs, _) = _layer(getkey()), _inputs(getkey)
    grad = jax.jit(jax.grad(ft.partial(_loss, layer)))
    text = lambda name: jax.export.export(grad, platforms=[name])(xs).mlir_module()
    assert text("tpu").count("tpu_custom_call") == 2
    # JAX exports no kernel of Triton's.
    assert "custom_call" not in text("cuda")


@pytest.mark.parametrize(
    "solver", [eqlx.FixedPointIteration(0.0, 1e-6, damp=0.3), _ANDERSON]
)
def test_where_there_can_be_no_kernel_the_loop_of_a_layer_runs(getkey, solver):
    # Exported for several platforms, none of which may hold one of Triton's.
    layer, (xs, _) = _layer(getkey(), solver), _inputs(getkey)
    run = jax.jit(jax.vmap(layer))
    exported = jax.export.export(run, platforms=["cpu", "cuda"])(xs)
    assert relative_error(exported.call(xs), _solution(layer, xs)) < 2e-5


@pytest.mark.parametrize(("m", "damp"), [(0, 0.5), (2, 0.25)])
def test_the_loop_takes_the_steps_of_the_kernel(getkey, by_kernel, m, damp):
    by_kernel[0]("tpu")
    solver = eqlx.FixedPointIteration(0.0, 1e-6, damp=damp)
    if m > 0:
        solver = eqlx.Anderson(0.0, 1e-6, damp=damp, history_length=m)
    # A batch of weights has no kernel.
    layer, x = _layer(getkey(), solver), jnp.ones(_IN, jnp.float32)
    alone = layer.solve(x)
    both = jax.tree.map(lambda x: jnp.stack([x] * 2) if eqx.is_array(x) else x, layer)
    sol = eqx.filter_vmap(lambda layer: layer.solve(x))(both)
    assert jnp.all(jnp.abs(sol.stats["num_steps"] - alone.stats["num_steps"]) <= 1)
    assert alone.stats["num_steps"] > 5
    assert jnp.all(sol.result == RESULTS.successful)
    assert jnp.allclose(sol.value, alone.value[None], atol=5e-6)
