"""Linear maps whose norm is bounded, and positive concave cells."""

import functools as ft
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from .helpers import dense_sensitivity, newton, relative_error


_BOUND, _TOLERANCE = 0.9, 1e-11
_property = settings(max_examples=12, deadline=None, derandomize=True, database=None)
_seeds = st.integers(0, 2**31 - 1)


def _nearest(row, bound):
    """The projection, its threshold by bisection."""
    if np.abs(row).sum() <= bound:
        return row
    theta, low, high = 0.0, 0.0, np.abs(row).max()
    for _ in range(200):
        theta = (low + high) / 2
        is_low = np.maximum(np.abs(row) - theta, 0).sum() > bound
        low, high = (theta, high) if is_low else (low, theta)
    return np.sign(row) * np.maximum(np.abs(row) - theta, 0)


@ft.cache
def _contractive(axis):
    linear = eqlx.nn.ContractiveLinear(6, _BOUND, axis=axis, key=jr.key(0))
    norm = eqlx.max_norm if axis == 1 else lambda y: jnp.sum(jnp.abs(y))
    solver = eqlx.FixedPointIteration(0.0, _TOLERANCE, norm)

    @jax.jit
    def run(weight, u):
        def solve(weight, u):
            this = eqx.tree_at(lambda li: li.weight, linear, weight)
            matrix = this.matrix()
            sol = eqlx.fixed_point(
                lambda z, u: jnp.tanh(matrix @ z + u),
                solver,
                jnp.zeros(6),
                u,
                max_steps=1000,
                throw=False,
                adjoint=eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver)),
            )
            return jnp.sum(sol.value), (sol, matrix)

        return jax.grad(solve, has_aux=True)(weight, u)

    return run


@pytest.mark.parametrize("axis", [0, 1])
@_property
@given(seed=_seeds, size=st.floats(-2.0, 3.0))
def test_a_bounded_norm_converges_for_any_parameters(axis, seed, size):
    rng = np.random.default_rng(seed)
    weight = 10**size * rng.standard_normal((6, 6))
    u = rng.standard_normal(6)
    grad, (sol, w) = _contractive(axis)(weight, u)
    rows = weight if axis == 1 else weight.T
    exact = np.stack([_nearest(row, _BOUND) for row in rows])
    exact = exact if axis == 1 else exact.T
    assert np.allclose(w, exact, atol=1e-15 * 36 * max(1, np.abs(weight).max()))
    assert np.linalg.norm(w, np.inf if axis == 1 else 1) < _BOUND + 1e-12
    assert np.abs(np.linalg.eigvals(w)).max() < _BOUND + 1e-12
    assert sol.result == eqlx.RESULTS.successful
    # By the contraction: a residual of at most 6 norms of u, times the bound a step.
    start = np.abs(np.tanh(u)).max() if axis == 1 else np.abs(np.tanh(u)).sum()
    promised = 1 + np.log(_TOLERANCE / start) / np.log(_BOUND)
    assert int(sol.stats["num_steps"]) <= promised
    # The derivative, by that of the projection: a threshold common to what is left.
    slope = 1 - np.square(sol.value)
    inverse = np.linalg.inv(np.eye(6) - slope[:, None] * exact)
    of_matrix = np.outer(inverse.sum(0) * slope, sol.value)
    of_matrix = of_matrix if axis == 1 else of_matrix.T
    signs = np.sign(exact if axis == 1 else exact.T)
    for row, sign, cotangent, got in zip(
        rows, signs, of_matrix, grad if axis == 1 else grad.T, strict=True
    ):
        expected = cotangent
        if np.abs(row).sum() > _BOUND:
            mean = np.sum(sign * cotangent) / np.abs(sign).sum()
            expected = np.abs(sign) * (cotangent - sign * mean)
        assert np.max(np.abs(got - expected)) < 1e-8


@ft.cache
def _scaled():
    linear = eqlx.nn.ContractiveLinear(6, _BOUND, axis=None, key=jr.key(0))
    solver = eqlx.FixedPointIteration(0.0, _TOLERANCE, eqlx.two_norm)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))

    @jax.jit
    def run(weight, u):
        def solve(weight):
            cell = eqx.tree_at(lambda li: li.weight, linear, weight)
            layer = eqlx.nn.FixedPointLayer(
                _Affine(cell), solver, adjoint=adjoint, max_steps=1000
            )
            sol = layer.solve(u)
            return jnp.sum(sol.value), (sol, cell.matrix())

        return jax.grad(solve, has_aux=True)(weight)

    return run


class _Affine(eqx.Module):
    linear: Any

    def __call__(self, z, x):
        return jnp.tanh(self.linear(z) + x)


def _loss_by_hand(weight, u):
    """The same in NumPy, the norm by the definition of its bound."""
    unit = weight / np.abs(weight).max()
    power = np.linalg.matrix_power(unit.T @ unit, 16)
    size = np.abs(weight).max() * np.linalg.norm(power) ** (1 / 32)
    w, z = min(1, _BOUND / size) * weight, np.tanh(u)
    for _ in range(400):
        z = np.tanh(w @ z + u)
    return z.sum()


@_property
@given(seed=_seeds, size=st.floats(-2.0, 30.0))
def test_a_bounded_two_norm_converges_for_any_parameters(seed, size):
    rng = np.random.default_rng(seed)
    weight, u = 10**size * rng.standard_normal((6, 6)), rng.standard_normal(6)
    grad, (sol, w) = _scaled()(weight, u)
    norm = np.linalg.norm(w, 2)
    assert norm < _BOUND + 1e-12
    assert norm > min(np.linalg.norm(weight, 2), _BOUND) / 6 ** (1 / 64) - 1e-12
    assert sol.result == eqlx.RESULTS.successful
    promised = 1 + np.log(_TOLERANCE / np.linalg.norm(np.tanh(u))) / np.log(_BOUND)
    assert int(sol.stats["num_steps"]) <= promised
    step = 1e-6 * np.abs(weight).max() * rng.standard_normal((6, 6))
    by_differences = _loss_by_hand(weight + step, u) - _loss_by_hand(weight - step, u)
    scale = np.sum(np.abs(grad * step)) + 1e-300
    assert abs(2 * np.sum(grad * step) - by_differences) < 1e-6 * scale + 1e-9 * scale


def test_a_weight_of_zeros_or_of_single_precision(getkey):
    linear = eqlx.nn.ContractiveLinear(5, axis=None, dtype=jnp.float32, key=getkey())
    total = lambda linear: jnp.sum(linear.matrix())
    for size in (0.0, 1e-30, 1e30):
        weight = jnp.full((5, 5), size, jnp.float32)
        this = eqx.tree_at(lambda li: li.weight, linear, weight)
        expected = min(size, _BOUND / 5)  # Of rank one: the bound is the norm.
        got, grads = eqx.filter_value_and_grad(total)(this)
        assert abs(got / 25 - expected) < 3e-6 * max(expected, 1e-30)
        if size < 1:
            assert np.all(grads.weight == 1)
        else:  # What is scaled back gains nothing by being larger.
            assert np.max(np.abs(grads.weight)) < 1e-30


def test_a_row_inside_the_ball_is_left_alone(getkey):
    linear = eqlx.nn.ContractiveLinear(5, dtype=jnp.bfloat16, key=getkey())
    weight = jnp.zeros((5, 5), jnp.bfloat16).at[0, 1].set(0.5)
    linear = eqx.tree_at(lambda li: li.weight, linear, weight)
    assert linear(jnp.ones(5, jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.array_equal(linear.matrix(), weight)
    # Zeros can be trained.
    total = lambda linear: jnp.sum(linear.matrix().astype(jnp.float32))
    assert np.all(eqx.filter_grad(total)(linear).weight == 1)


def test_inside_a_layer(getkey):
    linear = eqlx.nn.ContractiveLinear(5, 0.5, key=getkey())
    cell = lambda z, x: jax.nn.relu(linear(z) + x)
    layer = eqlx.nn.FixedPointLayer(cell, eqlx.Anderson(0.0, 1e-10))
    xs = jr.normal(getkey(), (3, 5))
    w = np.asarray(linear.matrix())
    for z, x in zip(jax.vmap(layer)(xs), xs, strict=True):
        assert np.max(np.abs(np.maximum(w @ z + x, 0) - z)) < 1e-9


@ft.cache
def _positive():
    cell = eqlx.nn.PositiveConcaveCell(3, 5, key=jr.key(0))
    solver = eqlx.FixedPointIteration(0.0, 1e-12)
    layer = eqlx.nn.FixedPointLayer(cell, solver, max_steps=20_000)

    @eqx.filter_jit
    def solve(weight, injection, bias, x, z0):
        where = lambda la: (la.cell.weight, la.cell.injection, la.cell.bias)
        this = eqx.tree_at(where, layer, (weight, injection, bias))
        return this.solve(x, z0=z0)

    return solve


@_property
@given(seed=_seeds, size=st.floats(-3.0, 3.0), input_size=st.floats(-2.0, 2.0))
def test_a_positive_concave_cell_has_one_fixed_point(seed, size, input_size):
    rng = np.random.default_rng(seed)
    weight = 10**size * rng.standard_normal((5, 5))
    injection = 10**input_size * rng.standard_normal((5, 3))
    bias, x = 10**input_size * rng.standard_normal(5), rng.standard_normal(3)
    arrays = (weight, injection, bias, x)
    sols = [_positive()(*arrays, z0) for z0 in (np.zeros(5), np.full(5, 50.0))]
    for sol in sols:
        z = np.asarray(sol.value)
        assert sol.result == eqlx.RESULTS.successful
        drive = 0.01 + np.logaddexp(injection @ x + bias, 0)
        assert np.max(np.abs(np.tanh(np.abs(weight) @ z + drive) - z)) < 2e-12
        assert np.all(z > 0)
    # From below and from above.
    assert np.max(np.abs(sols[0].value - sols[1].value)) < 1e-9
    # Not by a norm: that of the weight is anything.


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_gradients_of_a_positive_concave_cell(getkey, dtype):
    cell = eqlx.nn.PositiveConcaveCell(3, 5, jnp.log1p, dtype=dtype, key=getkey())
    cell = eqx.tree_at(lambda c: c.weight, cell, 2 * cell.weight)
    is_half = dtype == jnp.bfloat16
    solver = eqlx.FixedPointIteration(0.0, 2e-2 if is_half else 1e-12)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))
    layer = eqlx.nn.FixedPointLayer(cell, solver, adjoint=adjoint)
    xs = jr.normal(getkey(), (3, 3), dtype)
    arrays = lambda c: (c.weight, c.injection, c.bias)

    def total(layer):
        zs = jax.vmap(layer)(xs)
        return jnp.sum(zs.astype(jnp.float32 if is_half else dtype)), zs

    (_, zs), grads = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))(
        layer
    )
    assert zs.dtype == grads.cell.weight.dtype == dtype

    def fn(z, args):
        (weight, injection, bias), x = args
        drive = 0.01 + jnp.logaddexp(injection @ x + bias, 0.0)
        return jnp.log1p(jnp.abs(weight) @ z + drive)

    exact = [newton(fn, z, (arrays(cell), x)) for z, x in zip(zs, xs, strict=True)]
    assert relative_error(zs, jnp.stack(exact)) < (5e-2 if is_half else 1e-10)
    parts = [
        dense_sensitivity(fn, z, (arrays(cell), x))[0]
        for z, x in zip(exact, xs, strict=True)
    ]
    for got, each in zip(arrays(grads.cell), zip(*parts, strict=True), strict=True):
        expected = sum(part.sum(0) for part in each)
        assert relative_error(got, expected) < (0.1 if is_half else 1e-9)


def test_a_positive_concave_cell_tells_the_kernels_its_map(getkey):
    cell = eqlx.nn.PositiveConcaveCell(3, 5, key=getkey())
    x, z = jr.normal(getkey(), (3,)), jnp.ones(5)
    affine: Any = cell.fused(x)
    expected = jnp.tanh(affine.weight @ z + affine.u)
    assert np.allclose(cell(z, x), expected, atol=1e-15)
    assert affine.activation is jnp.tanh
    assert np.all(affine.weight >= 0)


_linear, _cell = eqlx.nn.ContractiveLinear, eqlx.nn.PositiveConcaveCell


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda key: _linear(4, 1.0, key=key), r"`bound`.*\(0, 1\).*1.0"),
        (lambda key: _linear(4, 0.0, key=key), "`bound`"),
        (lambda key: _linear(4, -0.5, key=key), "`bound`"),
        (lambda key: _linear(4, float("nan"), key=key), "`bound`"),
        (lambda key: _linear(4, axis=2, key=key), "`axis`.*2"),
        (lambda key: _linear(0, key=key), "`features`"),
        (lambda key: _linear(4, key=key)(jnp.ones(3)), r"`z`.*\(4,\).*\(3,\)"),
        (lambda key: _cell(2, 3, floor=0.0, key=key), "`floor`.*positive"),
        (lambda key: _cell(2, 3, jax.nn.relu, key=key), "`activation`.*linearly"),
        (lambda key: _cell(2, 3, jax.nn.softmax, key=key), "`activation`.*elementwise"),
        (lambda key: _cell(2, 3, jax.nn.softplus, key=key), "`activation`.*concave"),
        (lambda key: _cell(2, 3, jnp.sin, key=key), "`activation`.*concave"),
        (lambda key: _cell(2, 0, key=key), "`features`"),
        (lambda key: _cell(2, 3, key=key).fused(jnp.ones(3)), r"`x`.*\(2,\).*\(3,\)"),
    ],
)
def test_a_wrong_call_names_the_argument(getkey, call, match):
    with pytest.raises(ValueError, match=match):
        call(getkey())


@pytest.mark.parametrize("bound", [True, jnp.asarray(0.5)])
def test_a_bound_is_a_number_of_python(getkey, bound):
    with pytest.raises(TypeError, match="`bound`"):
        _linear(4, bound, key=getkey())
