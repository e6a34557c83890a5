"""What a cell's weights are made of once a solve: norms, projections."""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from .helpers import relative_error


_EPS = np.finfo(np.float64).eps


def test_weight_norm_parts_directions_from_lengths(getkey):
    weight = jr.normal(getkey(), (4, 3, 2)).at[1].set(0)
    norm = eqlx.nn.WeightNorm(weight)
    assert np.allclose(norm.prepare(), weight, rtol=4 * _EPS, atol=0)
    longer = eqx.tree_at(lambda n: n.direction, norm, 7 * weight)
    assert np.allclose(longer.prepare(), weight, rtol=4 * _EPS, atol=0)
    gain = 1 + jnp.arange(4.0)
    norm = eqx.tree_at(lambda n: n.gain, norm, gain)
    lengths = np.linalg.norm(np.asarray(norm.prepare()).reshape(4, 6), axis=1)
    assert np.allclose(lengths, [1, 0, 3, 4], rtol=1e-14)
    # Its derivative, written out: what is along a row does not turn it.
    ct = jr.normal(getkey(), weight.shape)
    grads = eqx.filter_grad(lambda n: jnp.sum(ct * n.prepare()))(norm)
    v, g = np.asarray(weight).reshape(4, 6), np.asarray(ct).reshape(4, 6)
    for i in (0, 2, 3):
        size = np.linalg.norm(v[i])
        along = g[i] @ v[i] / size
        expected = gain[i] / size * (g[i] - along * v[i] / size)
        assert np.allclose(grads.gain[i], along, rtol=1e-12)
        assert np.allclose(grads.direction[i].ravel(), expected, atol=1e-13)
    # A row of zeros may only be shrunk or grown to zeros, and that by finite steps.
    assert grads.gain[1] == 0
    assert np.allclose(grads.direction[1].ravel(), gain[1] * g[1])


def _spectral(weight, bound, **kwargs):
    make = eqx.nn.make_with_state(eqlx.nn.SpectralNorm)
    return make(weight, bound, key=jr.key(1), **kwargs)


def _made(norm, state):
    # Equinox lets a state be used once only; this is another.
    state = jtu.tree_map(lambda x: x, state)
    return eqlx.nn.prepare_with_state(norm, state)[0]


def _with_values(key, values):
    """A square matrix of these singular values, and its singular vectors."""
    n, keys = len(values), jr.split(key)
    left, right = (np.linalg.qr(jr.normal(k, (n, n)))[0] for k in keys)
    return jnp.asarray(left * np.asarray(values) @ right.T), left, right


def test_spectral_norm_keeps_the_two_norm_to_its_bound(getkey):
    weight, left, right = _with_values(getkey(), [3, 1, 0.5, 0.2, 0.1])
    norm, state = _spectral(weight, 0.8)
    made = _made(norm, state)
    assert np.allclose(made, 0.8 / 3 * weight, rtol=1e-13)
    # Its derivative: that of the largest singular value is the product of its vectors.
    ct = jr.normal(getkey(), (5, 5))
    loss = lambda n: jnp.sum(ct * _made(n, state))
    got = eqx.filter_grad(loss)(norm).weight
    of_value = np.outer(left[:, 0], right[:, 0])
    expected = 0.8 / 3 * (np.asarray(ct) - np.sum(ct * weight) / 3 * of_value)
    assert np.allclose(got, expected, atol=1e-13)
    # Within the bound nothing happens, to the derivative neither.
    norm, state = _spectral(weight, 3.1)
    assert np.array_equal(_made(norm, state), weight)
    loss = lambda n: jnp.sum(ct * _made(n, state))
    assert np.array_equal(eqx.filter_grad(loss)(norm).weight, ct)


def test_the_power_iteration_goes_on_from_where_it_was(getkey):
    old, *_ = _with_values(getkey(), [3, 1, 0.5, 0.2, 0.1])
    new, *_ = _with_values(getkey(), [2, 1, 0.5, 0.2, 0.1])
    norm, state = _spectral(old, 1.0, num_iterations=1)
    norm = eqx.tree_at(lambda n: n.weight, norm, new)
    still = eqx.nn.inference_mode(norm)
    assert eqlx.nn.prepare_with_state(still, state)[1] is state
    excess = []
    for _ in range(12):
        made, state = eqlx.nn.prepare_with_state(norm, state)
        excess.append(np.linalg.norm(made, 2) - 1)
    # The singular values are a factor of 2 apart, so the estimate gains one of 16.
    assert excess[0] > 1e-3
    assert abs(excess[-1]) < 1e-12
    assert all(b < 0.08 * a for a, b in zip(excess[2:8], excess[3:9], strict=True))


def test_a_kernel_of_a_convolution_and_half_precision(getkey):
    kernel = jr.normal(getkey(), (3, 2, 3, 3), jnp.bfloat16)
    norm, state = _spectral(kernel, 0.5)
    made, _ = eqlx.nn.prepare_with_state(norm, state)
    assert made.dtype == jnp.bfloat16
    assert made.shape == kernel.shape
    size = np.linalg.norm(np.asarray(made, np.float64).reshape(3, 18), 2)
    assert abs(size - 0.5) < 0.5 * 2**-8
    made = eqlx.nn.WeightNorm(kernel).prepare()
    assert made.dtype == jnp.bfloat16
    assert np.allclose(np.asarray(made, float), np.asarray(kernel, float), rtol=2**-6)


_calls = []


class _Counted(eqlx.nn.AbstractParametrisation):
    weight: Any

    def prepare(self):
        jax.debug.callback(lambda: _calls.append(None))
        return 0.5 * jnp.tanh(self.weight)


def _cell(key, wrap):
    cell = eqlx.nn.AffineCell(3, 5, key=key)
    return eqx.tree_at(lambda c: c.weight, cell, replace_fn=wrap)


def test_a_layer_prepares_its_cell_once_a_batch(getkey):
    layer = eqlx.nn.FixedPointLayer(
        _cell(getkey(), _Counted), eqlx.FixedPointIteration(0.0, 1e-12)
    )
    xs = jr.normal(getkey(), (4, 3))

    @eqx.filter_jit
    def run(layer, xs):
        loss = lambda layer: jnp.sum(jax.vmap(layer)(xs))
        return eqx.filter_value_and_grad(loss)(layer)

    _calls.clear()
    value, grads = run(layer, xs)
    jax.effects_barrier()
    assert len(_calls) == 1
    # Value and gradient, by a dense inverse.
    cell: Any = layer.cell
    raw, injection = np.asarray(cell.weight.weight), np.asarray(cell.injection)
    w, total, grad = 0.5 * np.tanh(raw), 0.0, 0.0
    for x in np.asarray(xs):
        z = np.zeros(5)
        for _ in range(200):
            z = np.tanh(w @ z + injection @ x)
        slope = 1 - z * z
        u = np.linalg.inv(np.eye(5) - slope[:, None] * w).T @ np.ones(5)
        total, grad = total + z.sum(), grad + np.outer(slope * u, z)
    assert abs(value - total) < 1e-10
    assert relative_error(grads.cell.weight.weight, grad * (0.5 - 2 * w * w)) < 1e-9


def test_one_parametrisation_inside_another(getkey):
    weight = jr.normal(getkey(), (5, 5))
    norm, state = _spectral(weight, 0.9, num_iterations=200)
    nested = eqx.tree_at(lambda n: n.weight, norm, replace_fn=_Counted)
    made, _ = eqlx.nn.prepare_with_state({"a": (nested, 1.0)}, state)
    inner = 0.5 * np.tanh(weight)
    size = np.linalg.norm(inner, 2)
    assert np.allclose(made["a"][0], min(1, 0.9 / size) * inner, rtol=1e-6)
    assert made["a"][1] == 1.0
    plain = eqlx.nn.prepare({"a": _Counted(weight), "b": None})
    assert np.allclose(plain["a"], inner, rtol=1e-14)
    assert plain["b"] is None


def test_training_against_the_bound_keeps_near_it():
    def make(key):
        wrap = lambda w: eqlx.nn.SpectralNorm(w, 0.9, key=key)
        return eqlx.nn.FixedPointLayer(
            _cell(key, wrap), eqlx.Anderson(0.0, 1e-8), batching=eqlx.Lockstep()
        )

    made: Any = eqx.nn.make_with_state(make)(jr.key(0))
    layer, state = made
    xs = 0.1 * jr.normal(jr.key(1), (8, 3))

    @eqx.filter_jit
    def step(layer, state):
        def loss(layer, state):
            layer, state = eqlx.nn.prepare_with_state(layer, state)
            sol = jax.vmap(layer.solve)(xs)
            return -jnp.sum(sol.value**2), (state, layer.cell.weight, sol.result)

        grads, aux = eqx.filter_grad(loss, has_aux=True)(layer, state)
        where = lambda la: la.cell.weight.weight
        layer = eqx.tree_at(where, layer, where(layer) - 0.005 * where(grads))
        return layer, *aux

    norms = []
    for _ in range(200):
        layer, state, weight, result = step(layer, state)
        assert np.all(result == eqlx.RESULTS.successful)
        norms.append(np.linalg.norm(weight, 2))
    assert np.linalg.norm(layer.cell.weight.weight, 2) > 0.95
    # Singular values overtake each other here, which an estimate takes time to see.
    assert 0.89 < np.max(norms) < 1.25 * 0.9
    assert np.median(norms) < 1.02 * 0.9


def test_what_is_wrong_is_named(getkey):
    weight = jnp.ones((3, 3))
    spectral = lambda *a, **k: eqlx.nn.SpectralNorm(*a, **k, key=getkey())
    for make in (eqlx.nn.WeightNorm, spectral):
        with pytest.raises(ValueError, match="`weight` .* at least two axes"):
            make(jnp.ones(3))
        with pytest.raises(ValueError, match="none of them empty"):
            make(jnp.ones((0, 3)))
        with pytest.raises(TypeError, match="weight"):
            make(jnp.ones((3, 3), int))
    with pytest.raises(ValueError, match="`bound` must be positive"):
        spectral(weight, -1.0)
    with pytest.raises(ValueError, match="`num_iterations` must be"):
        spectral(weight, 1.0, 0)
    norm, state = _spectral(weight, 0.9)
    layer = eqlx.nn.FixedPointLayer(
        _cell(getkey(), lambda _: norm), eqlx.FixedPointIteration(0.0, 1e-6)
    )
    with pytest.raises(ValueError, match="`SpectralNorm` .*prepare_with_state"):
        layer(jnp.ones(3))
    with pytest.raises(TypeError, match="state"):
        eqlx.nn.prepare_with_state(layer, {})  # pyright: ignore
    del state
