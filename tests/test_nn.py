"""The layer is an Equinox layer like any other."""

import io
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import dense_sensitivity, newton, relative_error


def _layer(key, in_features=4, features=6, **kwargs):
    cell = eqlx.nn.AffineCell(in_features, features, key=key)
    return eqlx.nn.FixedPointLayer(cell, eqlx.Anderson(0.0, 1e-11), **kwargs)


def _fn(z, args):
    (w, u, b), x = args
    return jnp.tanh(w @ z + u @ x + b)


def _arrays(cell):
    return cell.weight, cell.injection, cell.bias


def test_the_value_is_the_fixed_point_of_the_cell(getkey):
    layer, x = _layer(getkey()), jr.normal(getkey(), (4,))
    expected = newton(_fn, jnp.zeros(6), (_arrays(layer.cell), x))
    assert np.max(np.abs(layer(x) - expected)) < 1e-10
    sol = layer.solve(x)
    assert sol.result == eqlx.RESULTS.successful
    assert np.array_equal(sol.value, layer(x))
    assert 0 < sol.stats["num_steps"] < 30


def test_gradients_by_filter_grad(getkey):
    layer, x = _layer(getkey()), jr.normal(getkey(), (4,))
    grads = eqx.filter_jit(eqx.filter_grad(lambda layer, x: jnp.sum(layer(x))))(
        layer, x
    )
    z = newton(_fn, jnp.zeros(6), (_arrays(layer.cell), x))
    exact, _ = dense_sensitivity(_fn, z, (_arrays(layer.cell), x))
    for got, expected in zip(_arrays(grads.cell), exact, strict=True):
        assert relative_error(got, expected.sum(0)) < 1e-9
    assert grads.solver.rtol is None or grads.solver.rtol == 0


def test_in_a_sequential_with_other_layers(getkey):
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(3, 4, key=getkey()),
            _layer(getkey()),
            eqx.nn.Dropout(0.0),
            eqx.nn.Linear(6, 2, key=getkey()),
        ]
    )
    x = jr.normal(getkey(), (3,))
    layer: Any = model[1]
    hidden = newton(_fn, jnp.zeros(6), (_arrays(layer.cell), model[0](x)))
    assert np.allclose(model(x, key=getkey()), model[3](hidden), atol=1e-9)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(x)))(model)
    assert jnp.any(grads[0].weight != 0)


def test_a_batch_by_vmap_and_filter_vmap(getkey):
    layer, xs = _layer(getkey()), jr.normal(getkey(), (10, 4))
    expected = np.stack(
        [newton(_fn, jnp.zeros(6), (_arrays(layer.cell), x)) for x in xs]
    )
    for batch in (jax.vmap(layer)(xs), eqx.filter_vmap(layer)(xs)):
        assert np.max(np.abs(batch - expected)) < 1e-10


def test_an_ensemble_of_layers(getkey):
    keys, x = jr.split(getkey(), 3), jr.normal(getkey(), (4,))
    layers = eqx.filter_vmap(_layer)(keys)
    values = eqx.filter_vmap(lambda layer: layer(x))(layers)
    for key, value in zip(keys, values, strict=True):
        expected = newton(_fn, jnp.zeros(6), (_arrays(_layer(key).cell), x))
        assert np.max(np.abs(value - expected)) < 1e-10


def test_serialisation_brings_back_every_bit(getkey):
    layer, x = _layer(getkey()), jr.normal(getkey(), (4,))
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, layer)
    buffer.seek(0)
    other = eqx.tree_deserialise_leaves(buffer, _layer(getkey()))
    assert eqx.tree_equal(layer, other)
    assert np.array_equal(layer(x), other(x))


def test_training_lowers_a_loss(getkey):
    layer, xs = _layer(getkey()), jr.normal(getkey(), (8, 4))
    target = 0.5 * jnp.sin(xs @ jr.normal(getkey(), (4, 6)))
    loss = lambda layer: jnp.mean((jax.vmap(layer)(xs) - target) ** 2)

    @eqx.filter_jit
    def step(layer):
        value, grads = eqx.filter_value_and_grad(loss)(layer)
        return value, eqx.apply_updates(layer, jax.tree.map(lambda g: -0.5 * g, grads))

    losses = []
    for _ in range(40):
        value, layer = step(layer)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


class _NoisyCell(eqx.Module):
    affine: eqlx.nn.AffineCell

    def init(self, x):
        return jnp.zeros(6)

    def __call__(self, z, x, *, key):
        return self.affine(z, x) + 0.1 * jr.normal(key, z.shape)


def test_a_key_is_the_same_in_every_evaluation(getkey):
    # With fresh noise in each there would be no fixed point, and no convergence.
    cell = _NoisyCell(eqlx.nn.AffineCell(4, 6, key=getkey()))
    layer = eqlx.nn.FixedPointLayer(cell, eqlx.Anderson(0.0, 1e-11))
    x, key = jr.normal(getkey(), (4,)), getkey()
    sol = layer.solve(x, key=key)
    assert sol.result == eqlx.RESULTS.successful
    assert np.max(np.abs(cell(sol.value, x, key=key) - sol.value)) < 1e-10
    assert not np.allclose(sol.value, layer(x, key=getkey()))
    keys = jr.split(key, 3)
    values = jax.vmap(lambda key: layer(x, key=key))(keys)
    assert np.allclose(values[1], layer(x, key=keys[1]), atol=1e-9)
    assert not np.allclose(values[0], values[1])


def test_a_key_that_the_cell_does_not_take_is_left_out(getkey):
    layer, x = _layer(getkey()), jr.normal(getkey(), (4,))
    assert np.array_equal(layer(x, key=getkey()), layer(x))


def test_a_start_near_the_solution_takes_fewer_steps(getkey):
    layer, x = _layer(getkey()), jr.normal(getkey(), (4,))
    cold = layer.solve(x)
    warm = layer.solve(x, z0=cold.value)
    assert warm.stats["num_steps"] == 0
    assert np.array_equal(warm.value, cold.value)
    other = layer.solve(x, z0=jnp.ones(6))
    assert np.max(np.abs(other.value - cold.value)) < 1e-9


def test_a_plain_function_as_a_cell():
    layer = eqlx.nn.FixedPointLayer(
        lambda z, x: 0.5 * jnp.cos(z) + x, eqlx.FixedPointIteration(0.0, 1e-12)
    )
    z = layer(jnp.ones(3))
    assert np.max(np.abs(0.5 * np.cos(z) + 1 - z)) < 1e-11


def test_a_structured_state(getkey):
    def cell(z, x):
        return {"a": 0.5 * z["b"] + x, "b": 0.25 * z["a"]}

    layer = eqlx.nn.FixedPointLayer(cell, eqlx.Anderson(0.0, 1e-12))
    x = jr.normal(getkey(), (3,))
    z = layer(x, z0={"a": jnp.zeros(3), "b": jnp.zeros(3)})
    assert np.allclose(z["a"], x / (1 - 0.125), atol=1e-10)
    assert np.allclose(z["b"], 0.25 * x / (1 - 0.125), atol=1e-10)


def test_a_layer_does_not_raise_and_says_what_happened():
    layer = eqlx.nn.FixedPointLayer(
        lambda z, x: z + x, eqlx.FixedPointIteration(0.0, 1e-9), max_steps=5
    )
    assert np.allclose(layer(jnp.ones(2)), 5)
    assert layer.solve(jnp.ones(2)).result == eqlx.RESULTS.max_steps_reached
    loud = eqlx.nn.FixedPointLayer(
        layer.cell, layer.solver, max_steps=layer.max_steps, throw=True
    )
    with pytest.raises(eqx.EquinoxRuntimeError, match="max_steps"):
        jax.block_until_ready(loud(jnp.ones(2)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_affine_cell(getkey, dtype):
    cell = eqlx.nn.AffineCell(3, 200, jnp.sin, dtype=dtype, key=getkey())
    assert cell.weight.shape == (200, 200)
    assert cell.injection.shape == (200, 3)
    assert cell.weight.dtype == cell.bias.dtype == dtype
    x = jnp.ones(3, dtype)
    z = jr.normal(getkey(), (200,), dtype)
    w, u, b, z64 = (
        np.asarray(a, np.float64) for a in (cell.weight, cell.injection, cell.bias, z)
    )
    out = cell(z, x)
    assert out.dtype == dtype
    expected = np.sin(w @ z64 + u @ np.ones(3) + b)
    error = np.max(np.abs(np.asarray(out, np.float64) - expected))
    assert error < 50 * float(jnp.finfo(dtype).eps)
    # What the docstring promises: it contracts when it is new.
    assert 0.7 < np.linalg.norm(w, 2) < 0.9


def test_half_precision_from_end_to_end(getkey):
    cell = eqlx.nn.AffineCell(4, 6, dtype=jnp.bfloat16, key=getkey())
    layer = eqlx.nn.FixedPointLayer(cell, eqlx.Anderson(1e-2, 1e-2))
    x = jr.normal(getkey(), (4,), jnp.bfloat16)
    z, grads = eqx.filter_value_and_grad(
        lambda layer: jnp.sum(layer(x).astype(jnp.float32))
    )(layer)
    assert layer(x).dtype == grads.cell.weight.dtype == jnp.bfloat16
    exact = newton(_fn, jnp.zeros(6), (_arrays(cell), x))
    assert abs(float(z) - float(exact.sum())) < 0.1
    assert jnp.all(jnp.isfinite(grads.cell.weight))
