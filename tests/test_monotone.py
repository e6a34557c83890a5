"""Monotone layers: well-posed for any parameters, exact gradients."""

import functools as ft
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType

from .helpers import dense_sensitivity, newton, relative_error


_identity: Any = eqx.nn.Identity()
_picard = eqlx.FixedPointIteration(0.0, 1e-12)
# The backward pass by the splitting alone.
_SAME = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_picard, max_steps=5000))


def _layer(key, splitting, margin=0.5, features=6, solver=_picard, **kwargs):
    w_key, u_key = jr.split(key)
    dtype = kwargs.pop("dtype", None)
    return eqlx.nn.MonotoneLayer(
        eqlx.nn.MonotoneLinear(features, margin, dtype=dtype, key=w_key),
        eqx.nn.Linear(3, features, dtype=dtype, key=u_key),
        splitting,
        solver,
        **{"max_steps": 5000, "adjoint": _SAME} | kwargs,
    )


def _matrix(a, b, margin):
    return (1 - margin) * np.eye(len(a)) - a.T @ a + b - b.T


def _arrays(layer):
    linear, injection = layer.linear, layer.injection
    return linear.a, linear.b, injection.weight, injection.bias


def _fn(activation, margin, z, args):
    (a, b, weight, bias), x = args
    return activation(_matrix(a, b, margin) @ z + weight @ x + bias)


@pytest.mark.parametrize(
    ("splitting", "activation", "adjoint"),
    [
        (eqlx.nn.ForwardBackward(), jnp.tanh, _SAME),
        (eqlx.nn.PeacemanRachford(), jax.nn.relu, _SAME),
        (eqlx.nn.PeacemanRachford(0.3), jnp.tanh, eqlx.ImplicitAdjoint()),
        (eqlx.nn.PeacemanRachford(1.0), jnp.arctan, _SAME),
    ],
    ids=["fb_tanh", "pr_relu", "pr_tanh_default_adjoint", "pr_arctan"],
)
def test_values_and_gradients_of_a_batch(getkey, splitting, activation, adjoint):
    layer = _layer(getkey(), splitting, activation=activation, adjoint=adjoint)
    xs = jr.normal(getkey(), (3, 3))

    @eqx.filter_jit
    def both(layer, xs):
        def total(both):
            sol = jax.vmap(both[0].solve)(both[1])
            return jnp.sum(sol.value), sol

        return eqx.filter_value_and_grad(total, has_aux=True)((layer, xs))

    (_, sol), (grads, grad_xs) = both(layer, xs)
    assert np.all(sol.result == eqlx.RESULTS.successful)
    fn, arrays = ft.partial(_fn, activation, 0.5), _arrays(layer)
    zs = [newton(fn, z, (arrays, x)) for z, x in zip(sol.value, xs, strict=True)]
    for z, x in zip(zs, xs, strict=True):
        assert np.max(np.abs(fn(z, (arrays, x)) - z)) < 1e-13
    assert np.max(np.abs(sol.value - np.stack(zs))) < 1e-10
    parts = [dense_sensitivity(fn, z, (arrays, x)) for z, x in zip(zs, xs, strict=True)]
    for got, each in zip(
        _arrays(grads), zip(*[p[0] for p in parts], strict=True), strict=True
    ):
        assert relative_error(got, sum(part.sum(0) for part in each)) < 1e-8
    assert relative_error(grad_xs, jnp.stack([p[1].sum(0) for p in parts])) < 1e-8
    if isinstance(splitting, eqlx.nn.PeacemanRachford):
        # The factorisation, and the length of the step, are no parameters.
        assert jax.tree.all(
            jax.tree.map(lambda g: jnp.all(g == 0), grads.how.splitting)
        )


def test_gradients_of_a_batch_that_is_sharded(getkey):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    layer = _layer(getkey(), eqlx.nn.PeacemanRachford(), activation=jnp.tanh)
    xs = jr.normal(getkey(), (4, 3))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def total(arrays, xs):
        one = lambda arrays, x: eqx.combine(arrays, static)(x)
        run = eqlx.sharding.shard_vmap(one, mesh, "batch", in_axes=(None, 0))
        return jnp.sum(run(arrays, xs))

    grads = jax.jit(jax.grad(total))(arrays, xs)
    fn, given = ft.partial(_fn, jnp.tanh, 0.5), _arrays(layer)
    expected = 0
    for x in xs:
        z = newton(fn, jnp.zeros(6), (given, x))
        expected += dense_sensitivity(fn, z, (given, x))[0][0].sum(0)
    assert relative_error(grads.linear.a, expected) < 1e-8


@ft.cache
def _any_parameters(splitting):
    layer = _layer(jr.key(0), splitting, 1.0, features=5, max_steps=400_000)

    @eqx.filter_jit
    def solve(a, b, u, z0):
        this = eqx.tree_at(lambda la: (la.linear.a, la.linear.b), layer, (a, b))
        this = eqx.tree_at(lambda la: la.injection, this, _identity)
        return this.solve(u, z0=z0), this.linear.matrix()

    return solve


@pytest.mark.parametrize(
    ("splitting", "largest"),
    # The steps grow with L, and those of the second with its square.
    [(eqlx.nn.PeacemanRachford(), 10.0), (eqlx.nn.ForwardBackward(), 2.0)],
    ids=["peaceman_rachford", "forward_backward"],
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    a_size=st.floats(-3.0, 0.0),
    b_size=st.floats(-3.0, 0.5),
)
def test_it_converges_for_any_parameters(splitting, largest, seed, a_size, b_size):
    rng = np.random.default_rng(seed)
    a = largest * 10**a_size * rng.standard_normal((5, 5))
    b = largest * 10**b_size * rng.standard_normal((5, 5))
    u, z0 = rng.standard_normal((2, 5))
    sol, w = _any_parameters(splitting)(a, b, u, 10 * z0)
    assert sol.result == eqlx.RESULTS.successful
    assert np.allclose(w, _matrix(a, b, 1.0), atol=1e-12 * np.abs(w).max())
    monotone = np.eye(5) - np.asarray(w)
    size = np.linalg.norm(monotone, 2)
    least = np.linalg.eigvalsh((monotone + monotone.T) / 2).min()
    assert least > 1 - 1e-13 * size
    # A step moves by its length, 1 / L and 1 / L^2, times the residual of the cell.
    power = 1 if isinstance(splitting, eqlx.nn.PeacemanRachford) else 2
    z = np.asarray(sol.value)
    residual = np.max(np.abs(np.maximum(w @ z + u, 0) - z))
    assert residual < 1e-11 * (1 + size) ** power


def test_the_step_at_which_forward_backward_stops_converging(getkey):
    # With a skew W - (1 - m) I of one singular value, and no activation, the bound
    # 2 m / L^2 is sharp: the eigenvalues 1 - alpha (m +- i k) are on the unit circle.
    margin, k = 0.2, 1.5
    skew = k * np.kron(np.eye(3), [[0.0, 0.5], [-0.5, 0.0]])
    linear = eqlx.nn.MonotoneLinear(6, margin, key=getkey())
    linear = eqx.tree_at(
        lambda li: (li.a, li.b), linear, (jnp.zeros((6, 6)), jnp.asarray(skew))
    )
    u = jr.normal(getkey(), (6,))
    exact = np.linalg.solve(margin * np.eye(6) - (skew - skew.T), u)
    square = margin**2 + k**2
    map = linear.prepare((6,))
    for splitting in (eqlx.nn.ForwardBackward(), eqlx.nn.PeacemanRachford()):
        chosen = splitting.split(map, jax.nn.relu).alpha
        is_forward = isinstance(splitting, eqlx.nn.ForwardBackward)
        best = margin / square if is_forward else square**-0.5
        # All singular values are equal, for which the bound on L is at its worst.
        slack = 6 ** (1 / 32 if is_forward else 1 / 64)
        assert np.isclose(chosen, best / slack, rtol=1e-12)

    @eqx.filter_jit
    def solve(splitting):
        layer = eqlx.nn.MonotoneLayer(
            linear,
            _identity,
            splitting,
            _picard,
            activation=jax.nn.identity,
            max_steps=20_000,
        )
        return layer.solve(u)

    bound = jnp.asarray(2 * margin / square)
    below = solve(eqlx.nn.ForwardBackward(0.95 * bound))
    assert below.result == eqlx.RESULTS.successful
    assert np.max(np.abs(below.value - exact)) < 1e-9
    above = solve(eqlx.nn.ForwardBackward(1.05 * bound))
    assert above.result != eqlx.RESULTS.successful
    for alpha in (0.01, 0.1, 1.0, 10.0, 100.0):
        sol = solve(eqlx.nn.PeacemanRachford(jnp.asarray(alpha)))
        assert sol.result == eqlx.RESULTS.successful
        assert np.max(np.abs(sol.value - exact)) < 1e-8


def test_an_ensemble_of_layers(getkey):
    # Each made from its own key, in a `jax.vmap`.
    keys = jr.split(getkey(), 3)
    xs = jr.normal(getkey(), (3, 3))
    layers = eqx.filter_vmap(ft.partial(_layer, splitting=eqlx.nn.PeacemanRachford()))(
        keys
    )
    solve = eqx.filter_jit(eqx.filter_vmap(lambda layer, x: layer(x)))
    found = np.asarray(solve(layers, xs))
    for i, x in enumerate(xs):
        a, b, weight, bias = (np.asarray(y[i]) for y in _arrays(layers))
        w, u = _matrix(a, b, 0.5), weight @ np.asarray(x) + bias
        # Where it is positive it solves the linear system, elsewhere it is zero.
        is_active = found[i] > 0
        rows = np.eye(6) - is_active[:, None] * w
        assert np.allclose(found[i], np.linalg.solve(rows, is_active * u), atol=1e-10)
        assert np.all((w @ found[i] + u > 0) == is_active)


def test_peaceman_rachford_takes_at_most_a_third_of_the_steps(getkey):
    key, xs = getkey(), jr.normal(getkey(), (4, 3))
    steps = {}
    for splitting in (eqlx.nn.ForwardBackward(), eqlx.nn.PeacemanRachford()):
        layer = _layer(key, splitting, margin=0.1, features=20, max_steps=50_000)
        sol = eqx.filter_jit(eqx.filter_vmap(layer.solve))(xs)
        assert np.all(sol.result == eqlx.RESULTS.successful)
        steps[type(splitting)] = sol.stats["num_steps"]
    forward, peaceman = steps.values()
    assert np.all(3 * peaceman <= forward)


def test_one_factorisation_serves_all_steps_of_both_passes(getkey):
    layer = _layer(getkey(), eqlx.nn.PeacemanRachford(0.7))
    xs = jr.normal(getkey(), (16, 3))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def total(arrays, xs):
        return jnp.sum(jax.vmap(eqx.combine(arrays, static))(xs))

    text = jax.jit(jax.grad(total)).lower(arrays, xs).compile().as_text()
    assert text is not None
    assert "callback" not in text
    calls = [line for line in text.splitlines() if "getrf" in line and " = " in line]
    assert len(calls) == 1
    # Not in the body of a loop.
    assert calls[0] in text[text.index("\nENTRY") :]


def _circular(kernel, height, width):
    """A circular convolution as a dense matrix, the centre of the kernel at zero."""
    channels, _, size, _ = kernel.shape
    eye = np.eye(channels * height * width).reshape(-1, channels, height, width)
    out = np.zeros_like(eye)
    for dy in range(size):
        for dx in range(size):
            moved = np.roll(eye, (dy - size // 2, dx - size // 2), (2, 3))
            out += np.einsum("ij,njyx->niyx", kernel[:, :, dy, dx], moved)
    return out.reshape(len(eye), -1).T


def test_a_convolution_against_its_dense_matrix(getkey):
    margin, shape = 0.3, (2, 4, 5)
    linear = eqlx.nn.MonotoneConv(2, 3, margin, key=getkey())
    dense = [_circular(np.asarray(k), 4, 5) for k in (linear.a, linear.b)]
    w = _matrix(dense[0], dense[1], margin)
    z, u = jr.normal(getkey(), shape), jr.normal(getkey(), shape)
    assert np.allclose(linear(z).ravel(), w @ np.ravel(z), atol=1e-12)
    monotone = np.eye(40) - w
    assert np.linalg.eigvalsh((monotone + monotone.T) / 2).min() > margin - 1e-13
    norm = np.linalg.norm(monotone, 2)
    # A bound, a matrix of two channels for each frequency.
    assert 1 - 1e-12 < linear.prepare(shape).norm() / norm < 2 ** (1 / 64)

    layer = eqlx.nn.MonotoneLayer(
        linear,
        _identity,
        eqlx.nn.PeacemanRachford(),
        _picard,
        activation=jnp.tanh,
        adjoint=_SAME,
        max_steps=5000,
    )
    total = lambda layer, u: (jnp.sum(z * (y := layer(u))), y)
    both = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))
    (_, y), grads = both(layer, u)

    # In terms of the dense matrices of the kernels, and by linearity of these.
    fn = lambda y, args: jnp.tanh(_matrix(args[0], args[1], margin) @ y + u.ravel())
    exact = newton(fn, jnp.zeros(40), tuple(map(jnp.asarray, dense)))
    assert np.max(np.abs(y.ravel() - exact)) < 1e-10
    slope = 1 - np.square(exact)
    adjoint = np.linalg.solve(np.eye(40) - w.T * slope[None, :], np.ravel(z)) * slope
    # dW = -dA^T A - A^T dA + dB - dB^T.
    outer = np.outer(adjoint, exact)
    both_sides = outer + outer.T
    expected = (-dense[0] @ both_sides, outer - outer.T)
    for got, cotangent in zip((grads.linear.a, grads.linear.b), expected, strict=True):
        direction = np.asarray(jr.normal(getkey(), got.shape))
        change = np.sum(cotangent * _circular(direction, 4, 5))
        assert np.isclose(np.sum(got * direction), change, rtol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lower_precision(getkey, dtype):
    solver = eqlx.FixedPointIteration(0.0, 1e-2 if dtype == jnp.bfloat16 else 1e-5)
    layer = _layer(getkey(), eqlx.nn.PeacemanRachford(), 1.0, 4, solver, dtype=dtype)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))
    where = lambda la: (la.how.adjoint, la.injection.bias)
    layer = eqx.tree_at(where, layer, (adjoint, jnp.ones(4, dtype)))
    x = jr.normal(getkey(), (3,), dtype)
    total = lambda layer: (jnp.sum((z := layer(x)).astype(jnp.float32)), z)
    (_, z), grads = eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))(
        layer
    )
    assert z.dtype == grads.linear.a.dtype == dtype
    fn = ft.partial(_fn, jax.nn.relu, 1.0)
    exact = newton(fn, z, (_arrays(layer), x))
    slack = 20 * float(jnp.finfo(dtype).eps)
    assert relative_error(z, exact) < max(slack, 1e-4)
    grad = dense_sensitivity(fn, exact, (_arrays(layer), x))[0][0].sum(0)
    assert relative_error(grads.linear.a, grad) < max(slack, 1e-4)


def test_a_guess_near_the_solution_takes_fewer_steps(getkey):
    layer, x = _layer(getkey(), eqlx.nn.PeacemanRachford()), jr.normal(getkey(), (3,))
    solve = eqx.filter_jit(lambda z0: layer.solve(x, z0=z0))
    cold = solve(jnp.zeros(6))
    warm = solve(cold.value)
    assert warm.stats["num_steps"] <= 1 < cold.stats["num_steps"]


def _make(**kwargs: Any):
    given = {
        "linear": eqlx.nn.MonotoneLinear(4, key=jr.key(0)),
        "injection": eqx.nn.Identity(),
        "splitting": eqlx.nn.PeacemanRachford(),
        "solver": _picard,
    }
    return eqlx.nn.MonotoneLayer(**given | kwargs)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: eqlx.nn.MonotoneLinear(4, 0.0, key=jr.key(0)), "`margin`.*positive"),
        (lambda: eqlx.nn.MonotoneLinear(4, -1.0, key=jr.key(0)), "`margin`.*-1"),
        (lambda: eqlx.nn.MonotoneConv(4, margin=0, key=jr.key(0)), "`margin`"),
        (lambda: eqlx.nn.MonotoneConv(4, 0, key=jr.key(0)), "`kernel_size`"),
        (lambda: eqlx.nn.MonotoneLinear(0, key=jr.key(0)), "`features`"),
        (lambda: eqlx.nn.PeacemanRachford(0.0), "`alpha`.*positive"),
        (lambda: eqlx.nn.ForwardBackward(-0.1), "`alpha`.*-0.1"),
        (lambda: _make()(jnp.zeros(3)), r"`linear`.*\(4,\).*\(3,\)"),
        (lambda: _make()(jnp.zeros(4), z0=jnp.zeros(3)), r"`z0`.*\(4,\).*\(3,\)"),
        (lambda: _make(activation=jax.nn.gelu), "`activation`.*slope.* at"),
        (lambda: _make(activation=jax.nn.softmax), "`activation`.*elementwise"),
        (lambda: _make(activation=jnp.sum), "`activation`.*elementwise"),
        (lambda: _make(max_steps=0), "`max_steps`"),
    ],
)
def test_a_wrong_call_names_the_argument(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("splitting", "activation"),
    [
        (eqlx.nn.PeacemanRachford(linear_solver=lx.AutoLinearSolver(True)), jnp.tanh),
        (eqlx.nn.PeacemanRachford(linear_solver=lx.QR()), jax.nn.relu),
    ],
    ids=["auto", "qr"],
)
def test_other_linear_solvers(getkey, splitting, activation):
    layer, x = _layer(getkey(), splitting, activation=activation), jnp.ones(3)
    z = eqx.filter_jit(layer)(x)
    w, bias = _matrix(*_arrays(layer)[:2], 0.5), layer.injection(x)
    assert np.max(np.abs(activation(w @ z + bias) - z)) < 1e-11


@pytest.mark.parametrize(
    "splitting", [eqlx.nn.ForwardBackward(), eqlx.nn.PeacemanRachford()]
)
def test_the_backward_solve_speaks(getkey, splitting):
    layer: Any = _layer(getkey(), splitting, activation=jnp.tanh)
    x, ct = jr.normal(getkey(), (3,)), jr.normal(getkey(), (6,))
    z = layer(x)
    sol = layer.solve_adjoint(x, z, ct)
    assert sol.result == eqlx.RESULTS.successful
    assert sol.stats["is_usable"]
    assert 1 < sol.stats["num_steps"] <= 5000
    # Of `y = step(y)`, in which `y` is `z + alpha (W z + u - z)` or `z` itself:
    # whichever it is, the gradient in the injection is that of a dense inverse.
    map = layer.linear.prepare((6,))
    split = splitting.split(map, jnp.tanh)
    u = layer.injection(x)
    y = split.start(z, u)
    _, transposed = jax.vjp(lambda u: split.step(y, u), u)
    w, slope = np.asarray(layer.linear.matrix()), 1 - np.square(z)
    exact = slope * (np.linalg.inv(np.eye(6) - slope[:, None] * w).T @ ct)
    assert relative_error(transposed(sol.value)[0], exact) < 1e-9
    short = eqx.tree_at(
        lambda la: la.how.adjoint,
        layer,
        eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_picard, max_steps=2)),
    )
    assert short.solve_adjoint(x, z, ct).stats["num_steps"] == 2
    with pytest.raises(ValueError, match="`cotangent` must have the shape"):
        layer.solve_adjoint(x, z, ct[:2])
    unrolled = eqx.tree_at(
        lambda la: la.how.adjoint, layer, eqlx.RecursiveCheckpointAdjoint()
    )
    with pytest.raises(TypeError, match="RecursiveCheckpointAdjoint.* no linear solve"):
        unrolled.solve_adjoint(x, z, ct)
