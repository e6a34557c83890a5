"""Layers with a bound on their Lipschitz constant, for any parameters."""

import functools as ft

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from .helpers import dense_sensitivity, newton, relative_error


_NAMES = ("output", "injection", "log_metric", "v", "s", "bias")
_SHAPES = ((2, 5), (5, 3), (5,), (5, 5), (5, 5), (5,))
_MARGIN = 0.5
_picard = eqlx.FixedPointIteration(0.0, 1e-11)


def _layer(gamma, solver=_picard, activation=jax.nn.relu, **kwargs):
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver, max_steps=9000))
    given = {"adjoint": adjoint, "max_steps": 300_000, "key": jr.key(0)}
    return eqlx.nn.LipschitzBoundedLayer(
        3,
        5,
        2,
        gamma,
        eqlx.nn.PeacemanRachford(),
        solver,
        margin=_MARGIN,
        activation=activation,
        **given | kwargs,
    )


def _arrays(layer):
    return tuple(getattr(layer, name) for name in _NAMES)


def _matrix(gamma, arrays):
    """The formula of the docstring, by the plain products."""
    output, injection, log_metric, v, s, _ = arrays
    metric = jnp.diag(jnp.exp(log_metric))
    inner = output.T @ output + metric @ injection @ injection.T @ metric
    inner = inner / (2 * gamma) + v.T @ v + s - s.T
    return (1 - _MARGIN) * jnp.eye(5) - jnp.linalg.inv(metric) @ inner


@ft.cache
def _any_parameters(gamma):
    layer = _layer(gamma)

    @eqx.filter_jit
    def run(arrays, xs):
        this = eqx.tree_at(_arrays, layer, arrays)
        sol = jax.vmap(this.solve)(xs)
        return sol.result, jax.vmap(this)(xs), this.matrix()

    return run


@pytest.mark.parametrize("gamma", [0.2, 10.0])
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.floats(-1.5, 0.7))
def test_the_bound_holds_for_any_parameters(gamma, seed, size):
    rng = np.random.default_rng(seed)
    arrays = tuple(10**size * rng.standard_normal(shape) for shape in _SHAPES)
    arrays = (*arrays[:2], rng.uniform(-2, 2, 5), *arrays[3:])
    xs = rng.standard_normal((16, 3))
    # Pairs near and far.
    xs[8:] = xs[:8] + 10 ** rng.uniform(-2, 1, (8, 1)) * rng.standard_normal((8, 3))
    result, ys, w = _any_parameters(gamma)(arrays, xs)
    assert np.all(result == eqlx.RESULTS.successful)
    exact = _matrix(gamma, arrays)
    size = np.linalg.norm(exact, 2)
    assert np.allclose(w, exact, atol=1e-12 * size)

    # The matrix inequality of which the bound is a consequence.
    output, injection, log_metric, *_ = arrays
    metric = np.diag(np.exp(log_metric))
    lmi = 2 * metric - metric @ w - np.asarray(w).T @ metric
    lmi = lmi - output.T @ output / gamma
    lmi = lmi - metric @ injection @ injection.T @ metric / gamma
    lmi = (lmi + lmi.T) / 2
    slack = 1e-13 * np.linalg.norm(metric @ w, 2)
    assert np.linalg.eigvalsh(lmi - 2 * _MARGIN * metric).min() > -slack

    # Of all pairs.
    distances = lambda x: np.linalg.norm(x[:, None] - x[None, :], axis=-1)
    error = 1e-9 * (1 + np.linalg.norm(output, 2)) * (1 + size)
    assert np.all(distances(np.asarray(ys)) <= gamma * distances(xs) + error)


def test_the_bound_is_nearly_reached():
    # A linear activation, W = 0 but for what the bound takes: z = (I + U U^T / gamma
    # + ...)^-1 U x, whose slope is gamma at W_o = U^T = sqrt(gamma) times identity for
    # a margin of zero.
    gamma, margin = 3.0, 1e-3
    root = gamma**0.5 * jnp.eye(4)
    layer = eqlx.nn.LipschitzBoundedLayer(
        4,
        4,
        4,
        gamma,
        eqlx.nn.PeacemanRachford(),
        _picard,
        margin=margin,
        activation=jax.nn.identity,
        max_steps=5000,
        key=jr.key(0),
    )
    zero = jnp.zeros((4, 4))
    where = lambda la: (la.output, la.injection, la.v, la.s)
    layer = eqx.tree_at(where, layer, (root, root, zero, zero))
    slope = eqx.filter_jit(layer)(jnp.eye(4)[0])[0] - layer.output_bias[0]
    assert np.isclose(slope, gamma / (1 + margin), rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_gradients_against_a_dense_inverse(getkey, dtype):
    is_half = dtype == jnp.bfloat16
    solver = eqlx.FixedPointIteration(0.0, 1e-2) if is_half else _picard
    layer = _layer(2.0, solver, jnp.tanh, dtype=dtype)
    metric = 0.5 * jr.normal(getkey(), (5,), dtype)
    layer = eqx.tree_at(lambda la: la.log_metric, layer, metric)
    xs = jr.normal(getkey(), (3, 3), dtype)

    def total(layer):
        ys = jax.vmap(layer)(xs)
        return jnp.sum(ys.astype(jnp.float32 if is_half else dtype)), ys

    (_, ys), grads = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))(
        layer
    )
    assert ys.dtype == grads.v.dtype == dtype
    arrays = jax.tree.map(lambda a: a.astype(jnp.float64), _arrays(layer))

    def fn(z, args):
        arrays, x = args
        return jnp.tanh(_matrix(2.0, arrays) @ z + arrays[1] @ x + arrays[5])

    expected = [jnp.zeros(a.shape) for a in arrays]
    for y, x in zip(ys, xs.astype(jnp.float64), strict=True):
        z = newton(fn, jnp.zeros(5), (arrays, x))
        assert relative_error(y, arrays[0] @ z) < (5e-2 if is_half else 1e-9)
        parts = dense_sensitivity(fn, z, (arrays, x))[0]
        weights = arrays[0].sum(0)
        for i, part in enumerate(parts):
            expected[i] += jnp.tensordot(weights, part, 1)
        expected[0] += jnp.broadcast_to(z, (2, 5))
    for got, exact in zip(_arrays(grads), expected, strict=True):
        assert relative_error(got, exact) < (0.1 if is_half else 1e-8)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"gamma": 0.0}, "`gamma`.*positive"),
        ({"gamma": -1.0}, "`gamma`.*-1"),
        ({"gamma": 1.0, "margin": 0.0}, "`margin`.*positive"),
        ({"gamma": 1.0, "features": 0}, "`features`"),
        ({"gamma": 1.0, "activation": jax.nn.silu}, "`activation`.*slope"),
    ],
)
def test_a_wrong_call_names_the_argument(getkey, kwargs, match):
    given = {
        "in_features": 3,
        "features": 5,
        "out_features": 2,
        "splitting": eqlx.nn.PeacemanRachford(),
        "solver": _picard,
        "key": getkey(),
    }
    with pytest.raises(ValueError, match=match):
        eqlx.nn.LipschitzBoundedLayer(**given | kwargs)


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"`x`.*\(3,\).*\(4,\)"):
        _layer(1.0).solve(jnp.ones(4))
