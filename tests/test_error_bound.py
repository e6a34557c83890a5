"""Bounds on the error of a value and of its gradient, beside the errors themselves."""

# Some calls are wrong on purpose.
# pyright: reportArgumentType=false

import dataclasses
import functools as ft

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from equilax._singular_value import bidiagonalise, bound_from
from jax import export
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec as P

from . import problems
from .helpers import newton, optimised_hlo, tanh_cell, tanh_problem, to_float64


def _at(y):
    """A solution of which only the value counts."""
    return eqlx.Solution(y, eqlx.RESULTS.successful, None, {}, None)


def _split(tree):
    """One real vector: the real parts of all, then the imaginary ones."""
    flat = ravel_pytree(tree)[0]
    flat = flat if flat.size else jnp.zeros(0)
    return jnp.concatenate([flat.real, flat.imag]) if jnp.iscomplexobj(flat) else flat


def _joiner(tree):
    flat, unravel = ravel_pytree(tree)
    if not jnp.iscomplexobj(flat):
        return unravel
    return lambda x: unravel(jax.lax.complex(x[: flat.size], x[flat.size :]))


class _Truth:
    """The dense derivatives of `fn` in float64, in real and imaginary parts."""

    def __init__(self, fn, expected, args):
        self.expected, self.args = to_float64(
            jax.tree.map(jnp.asarray, (expected, args))
        )
        join_y, join_args = _joiner(self.expected), _joiner(self.args)
        of_both = lambda x, q: _split(fn(join_y(x), join_args(q)))
        self.derivatives = jax.jit(jax.jacfwd(of_both, (0, 1)))
        self.there = self.at(self.expected)

    def at(self, y):
        """`J` and `(I - J)^-1 B`."""
        y = to_float64(jax.tree.map(jnp.asarray, y))
        jacobian, in_args = self.derivatives(_split(y), _split(self.args))
        size = len(jacobian)
        system = np.eye(size) - np.asarray(jacobian)
        return np.asarray(jacobian), np.linalg.solve(system, in_args.reshape(size, -1))

    def __call__(self, y):
        """The distance to the solution, the contraction at both, the gradient's error.

        That is the largest change of a gradient whose cotangent has length one.
        """
        here = self.at(y)
        gap = _norm(_split(to_float64(y)) - _split(self.expected))
        contraction = max(_norm(here[0]), _norm(self.there[0]))
        return gap, contraction, _norm(here[1] - self.there[1])


def _norm(x):
    return float(np.linalg.norm(x, 2)) if np.size(x) else 0.0


def _errors(fn, y, expected, args):
    return _Truth(fn, expected, args)(y)


def _iterate(fn, y, args, tol):
    """The plain iteration until the residual is below `tol`."""

    @jax.jit
    def step(y):
        f = fn(y, args)
        gap = jax.tree.map(lambda a, b: to_float64(a) - to_float64(b), f, y)
        return f, jnp.linalg.norm(_split(gap))

    for _ in range(20_000):
        f, residual = step(y)
        if not residual >= tol:
            return y
        y = f
    return y


# Some of these converge, but the two-norm of `J` is above one.
_NO_CONTRACTION = ["expanding", "non_normal", "self_consistent_field"]
_NO_CONTRACTION += ["value_iteration"]
# Of a weight of this size the dense derivative is too large.
_LARGE = "tanh_100_0.9"
_CONTRACTIONS = [name for name in problems.NAMES if name not in _NO_CONTRACTION]
# Seconds for what others show: this one is larger, and those are affine like four more.
for _name in ("tanh_300_0.99", "linear_0.5", "linear_0.9"):
    _CONTRACTIONS.remove(_name)


def _problem(name):
    problem = problems.make(name)
    if name != _LARGE:
        return problem
    w, x = problem.args
    fn = lambda y, x: tanh_cell(y, (w, x))
    return dataclasses.replace(problem, fn=fn, args=x)


@pytest.mark.parametrize("name", _CONTRACTIONS)
def test_holds_and_is_tight_on_the_problem_set(name):
    problem = _problem(name)
    fn, args = problem.fn, problem.args
    truth = _Truth(fn, problem.expected, args)
    # What a residual that is uncertain in its last places allows.
    room = 40 * problem.rounding * _norm(_split(truth.expected))
    room = room / (1 - _norm(truth.there[0]))

    run = lambda y: eqlx.error_bound(_at(y), fn, args, num_steps=48)
    y0 = jax.tree.map(jnp.asarray, problem.y0)
    ys = [_iterate(fn, y0, args, tol) for tol in (1e-2, 1e-6)]
    for size in (1e-1, 1e-8):

        def shift(x, like, size=size):
            wave = jnp.cos(jnp.arange(1.0, x.size + 1)).reshape(x.shape)
            return (x + size * wave.astype(x.dtype)).astype(like.dtype)

        ys.append(jax.tree.map(shift, truth.expected, y0))
    for y in ys:
        bound, (error, contraction, gradient) = run(y), truth(y)
        assert error <= bound.value + 1e-13
        assert bound.value <= 1.5 * error + room
        # To second order in the distance to the solution that it is looked at from.
        assert contraction <= bound.contraction * (1 + 1e-7)
        assert bound.contraction <= 1.01 * contraction
        assert gradient <= bound.gradient * (1 + 1e-6) + 1e-12
        if name not in ("cosine", "mixed_tree", _LARGE):
            assert bound.gradient <= 20 * gradient + 1e-6


@pytest.mark.parametrize("name", _NO_CONTRACTION)
def test_infinite_where_the_two_norm_does_not_contract(name):
    problem = problems.make(name)
    y = jax.tree.map(jnp.asarray, problem.expected)
    bound = eqlx.error_bound(_at(y), problem.fn, problem.args)
    norm = _norm(_Truth(problem.fn, y, problem.args).there[0])
    assert np.isclose(bound.contraction, norm, rtol=1e-3)
    assert norm > 1
    assert bound.value == np.inf
    assert bound.gradient == np.inf
    assert bound.residual < 1e-12


def test_too_few_steps_make_it_larger_not_wrong():
    problem = _problem("tanh_100_0.9")
    y = jnp.asarray(problem.expected) + 1e-3
    error, contraction, _ = _errors(problem.fn, y, problem.expected, problem.args)
    bounds = [
        eqlx.error_bound(_at(y), problem.fn, problem.args, num_steps=num_steps)
        for num_steps in (2, 6, 40)
    ]
    for bound in bounds:
        assert contraction < bound.contraction
        assert error <= bound.value
        assert bound.value == np.inf or bound.contraction < 1
    assert bounds[0].contraction > bounds[1].contraction > bounds[2].contraction
    assert bounds[2].contraction < 1.001 * contraction
    assert bounds[2].value < 1.01 * error


def test_of_an_affine_map_it_is_the_error_itself():
    # d(y*)/d(a, b) = (y, 1) / (1 - a).
    fn = lambda y, args: args[0] * y + args[1]
    a, b, y = 0.75, 3.0, jnp.array(10.0)
    args = (jnp.array(a), jnp.array(b))
    bound = eqlx.error_bound(_at(y), fn, args)
    error = 12.0 - 10.0
    assert np.isclose(bound.residual, 0.5, rtol=1e-12)
    assert np.isclose(bound.contraction, a, rtol=1e-12)
    assert np.isclose(bound.value, error, rtol=1e-12)
    assert np.isclose(bound.gradient, error / (1 - a), rtol=1e-9)
    # The residual that the adjoint leaves is multiplied by |B| / (1 - a).
    more = eqlx.error_bound(_at(y), fn, args, tolerance=1e-2)
    expected = bound.gradient + 1e-2 * np.hypot(10.0, 1.0) / (1 - a)
    assert np.isclose(more.gradient, expected, rtol=1e-9)
    assert more.value == bound.value


def test_a_changing_jacobian_is_in_the_gradient():
    # y = c sin(y) + 1 with the parameter c: J = c cos(y), B = sin(y).
    fn = lambda y, c: c * jnp.sin(y) + 1
    c = jnp.array(0.5)
    expected = newton(fn, jnp.array(1.5), c)
    slope = lambda y: np.sin(y) / (1 - 0.5 * np.cos(y))
    for size in (0.3, 1e-2, -1e-4, 1e-9):
        y = expected + size
        bound = eqlx.error_bound(_at(y), fn, c)
        error = abs(float(slope(y) - slope(expected)))
        assert error <= bound.gradient <= 5 * error
        assert abs(size) * (1 - 1e-6) <= bound.value <= 1.01 * abs(size)


def test_the_solution_itself_is_known_to_rounding_only():
    fn = lambda y, c: c * jnp.cos(y)
    c = jnp.array(0.9, jnp.float32)
    y = newton(fn, jnp.array([0.5, 0.6]), c).astype(jnp.float32)
    bound = eqlx.error_bound(_at(y), fn, c)
    eps = float(jnp.finfo(jnp.float32).eps)
    assert eps < bound.value < 40 * eps
    assert eps < bound.gradient < 100 * eps
    # Nor does a residual of zero say that there is no error.
    bound = eqlx.error_bound(
        _at(jnp.array([3.0])), lambda y, c: c * y / y, jnp.array(3.0)
    )
    assert bound.residual == 0
    assert 1e-16 < bound.value < 1e-13


def test_newton_that_overshoots_is_not_followed():
    # Newton's method for atan(y) = 0 diverges from here.
    fn = lambda y, c: y - c * jnp.arctan(y)
    y = jnp.array([1.5])
    bound = eqlx.error_bound(_at(y), fn, jnp.array(0.9))
    assert 1.5 <= bound.value < 4
    assert bound.contraction > 1 - 0.9 / 3.25


def test_the_way_is_looked_at_in_its_middle():
    # J is nothing at the start and at the solution, and diag(0, 0.9) half way.
    fn = lambda y, _: jnp.stack([0 * y[0], 3.6 * y[0] * (1 - y[0]) * y[1]])
    bound = eqlx.error_bound(_at(jnp.array([1.0, 0.0])), fn)
    assert np.isclose(bound.contraction, 0.9)
    assert np.isclose(bound.value, 1.0)


def test_a_contraction_that_is_weaker_at_the_solution(getkey):
    # Saturated at `y`: the norm there says little, and few steps lead nowhere near.
    w, x = tanh_problem(getkey(), 30, 0.95)
    args = (w, 0.01 * x)
    expected = newton(tanh_cell, jnp.zeros(30), args)
    truth = _Truth(tanh_cell, expected, args)
    for num_steps in (2, 30):
        for size in (0.5, 2.0, 5.0, 20.0):
            y = expected + size * jr.normal(getkey(), (30,))
            bound = eqlx.error_bound(_at(y), tanh_cell, args, num_steps=num_steps)
            error, contraction, gradient = truth(y)
            assert error <= bound.value
            assert gradient <= bound.gradient
            assert contraction <= bound.contraction


@pytest.mark.parametrize("tol", [1e-1, 0.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision(getkey, dtype, tol):
    w, x = tanh_problem(getkey(), 12, 0.7, dtype)
    y = _iterate(tanh_cell, jnp.zeros(12, dtype), (w, x), max(tol, 1e-7))
    bound = eqlx.error_bound(_at(y), tanh_cell, (w, x))
    expected = newton(tanh_cell, jnp.zeros(12), (w, x))
    error, contraction, gradient = _errors(tanh_cell, y, expected, (w, x))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(bound))
    eps = float(jnp.finfo(dtype).eps)
    assert error <= bound.value <= 2 * error + 200 * eps
    assert gradient <= bound.gradient <= 20 * gradient + 2000 * eps
    assert np.isclose(bound.contraction, contraction, rtol=2e-2 + 10 * eps, atol=0)


def test_single_precision_complex(getkey):
    c = 0.2 * jr.normal(getkey(), (4,), jnp.complex64)
    fn = lambda y, c: 0.4 * jnp.exp(1j * jnp.conj(y)).astype(y.dtype) + c
    expected = to_float64(jnp.zeros(4, jnp.complex64))
    for _ in range(500):
        expected = fn(expected, to_float64(c))
    y = (expected + 0.01 * (0.6 - 0.8j)).astype(jnp.complex64)
    bound = eqlx.error_bound(_at(y), fn, c)
    error, contraction, gradient = _errors(fn, y, expected, c)
    assert bound.value.dtype == jnp.float32
    assert error * (1 - 1e-5) <= bound.value <= 1.1 * error
    assert np.isclose(bound.contraction, contraction, rtol=1e-2)
    assert gradient <= bound.gradient <= 20 * gradient


def test_what_fn_has_captured_counts(getkey):
    w, x = tanh_problem(getkey(), 6, 0.8)
    expected = newton(tanh_cell, jnp.zeros(6), (w, x))
    y = expected + 1e-3 * jr.normal(getkey(), (6,))
    _, _, gradient = _errors(tanh_cell, y, expected, (w, x))

    def closed(y, index):
        return tanh_cell(y, (w, x)), index

    # An integer has no gradient.
    bound = eqlx.error_bound(_at(y), closed, jnp.array(3), has_aux=True)
    assert gradient <= bound.gradient <= 20 * gradient
    alone = eqlx.error_bound(_at(y), lambda y, _: 0.5 * y)
    assert alone.gradient == 0


def test_a_solution_of_fixed_point(getkey):
    w, x = tanh_problem(getkey(), 8, 0.8)
    for tol in (1e-1, 1e-9):
        solver = eqlx.Anderson(0.0, tol, norm=eqlx.two_norm)
        sol = eqlx.fixed_point(tanh_cell, solver, jnp.zeros(8), (w, x))
        bound = eqlx.error_bound(sol, tanh_cell, (w, x))
        error, _, _ = _errors(
            tanh_cell, sol.value, newton(tanh_cell, sol.value, (w, x)), (w, x)
        )
        assert np.isclose(bound.residual, sol.stats["residual"], rtol=1e-9)
        assert error <= bound.value * (1 + 1e-6)


def _batch(getkey, dtype=jnp.float64):
    w, _ = tanh_problem(getkey(), 5, 0.8, dtype)
    xs = jnp.linspace(0.1, 2, 16, dtype=dtype)[:, None]
    xs = xs * jr.normal(getkey(), (16, 5), dtype)
    stars = jnp.stack([newton(tanh_cell, jnp.zeros(5), (w, x)) for x in xs])
    sizes = 10.0 ** -jnp.linspace(1, 6, 16)[:, None]
    return w, xs, stars, stars + sizes * jr.normal(getkey(), (16, 5))


def _check_batch(bounds, w, xs, stars, ys):
    bounds = jax.tree.map(np.asarray, bounds)
    truth = _Truth(tanh_cell, stars[0], (w, xs[0]))
    for i, x in enumerate(xs):
        truth.expected, truth.args = stars[i], (w, x)
        truth.there = truth.at(stars[i])
        error, contraction, gradient = truth(ys[i])
        assert error * (1 - 1e-6) <= bounds.value[i] <= 1.1 * error
        assert np.isclose(bounds.contraction[i], contraction, rtol=0.02)
        assert gradient <= bounds.gradient[i] <= 20 * gradient


def test_one_bound_for_each_sample_of_a_batch(getkey):
    w, xs, stars, ys = _batch(getkey)
    one = lambda y, x: eqlx.error_bound(_at(y), tanh_cell, (w, x))
    _check_batch(jax.jit(jax.vmap(one))(ys, xs), w, xs, stars, ys)


def test_a_sample_that_is_not_finite_or_expands_is_alone(getkey):
    w, xs, _, ys = _batch(getkey)
    gains = jnp.ones(16).at[4].set(3.0).at[9].set(jnp.inf)
    ys = ys.at[2, 1].set(jnp.nan)
    one = lambda y, x, g: eqlx.error_bound(_at(y), tanh_cell, (g * w, x))
    bounds = jax.vmap(one)(ys, 0.01 * xs, gains)
    bad = np.isin(np.arange(16), [2, 4, 9])
    for bound in (bounds.value, bounds.gradient):
        assert np.all(np.isposinf(bound) == bad)
    assert not np.any(np.isnan(bounds.contraction) & ~bad)
    assert not np.isfinite(bounds.residual[2])
    assert bounds.contraction[4] > 1


def _shard(axis_type, fn, w, xs, ys):
    mesh = jax.make_mesh((8,), ("b",), axis_types=(axis_type,))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    run = jax.shard_map(
        lambda w, xs, ys: jax.vmap(lambda x, y: fn(w, x, y))(xs, ys),
        mesh=mesh,
        in_specs=(P(), P("b"), P("b")),
        out_specs=P("b"),
        check_vma=True,
    )
    return jax.jit(run)(place(w, P()), place(xs, P("b")), place(ys, P("b")))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit])
def test_in_shard_map(getkey, axis_type):
    w, xs, stars, ys = _batch(getkey)
    one = lambda w, x, y: eqlx.error_bound(_at(y), tanh_cell, (w, x))
    _check_batch(_shard(axis_type, one, w, xs, ys), w, xs, stars, ys)


def test_captured_in_shard_map(getkey):
    # What is replicated has a derivative that is summed over the devices.
    w, xs, stars, ys = _batch(getkey)

    def one(w, x, y):
        return eqlx.error_bound(_at(y), lambda y, x: tanh_cell(y, (w, x)), x)

    bounds = _shard(AxisType.Auto, one, w, xs, ys)
    assert np.all(np.isposinf(bounds.gradient))
    error = np.linalg.norm(ys - stars, axis=1)
    assert np.all(error * (1 - 1e-6) <= bounds.value)
    assert np.all(bounds.value <= 1.1 * error)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_can_be_exported(getkey, platform):
    w, xs, stars, ys = _batch(getkey, jnp.float32)
    ys = ys.astype(jnp.float32)
    one = lambda w, y, x: eqlx.error_bound(_at(y), tanh_cell, (w, x)).value
    run = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))
    exported = export.export(run, platforms=[platform])(w, ys, xs)
    again = export.deserialize(exported.serialize())
    if platform == "cpu":
        got = np.asarray(again.call(w, ys, xs))
        error = np.linalg.norm(to_float64(ys) - stars, axis=1)
        assert np.all(error <= got)
        assert np.all(got <= 1.1 * error + 2e-5)


def test_holds_no_callback_and_has_no_derivative(getkey):
    w, xs, _, ys = _batch(getkey)

    def total(y, x, w):
        bound = eqlx.error_bound(_at(y), tanh_cell, (w, x))
        return bound.value + bound.gradient + bound.contraction + bound.residual

    assert "custom-call" not in optimised_hlo(total, ys[0], xs[0], w)
    for grad in jax.grad(total, (0, 1, 2))(ys[0], xs[0], w):
        assert np.all(grad == 0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0)])
def test_small_and_empty(shape):
    y = {"a": jnp.full(shape, 5.0), "b": jnp.full(shape, 1.0)}
    fn = lambda y, c: {"a": c * y["a"], "b": c * y["b"]}
    bound = eqlx.error_bound(_at(y), fn, jnp.array(-0.5))
    # Zero is the solution.
    size = np.sqrt(26.0) if np.prod(shape) else 0.0
    assert np.isclose(bound.residual, 1.5 * size)
    assert np.isclose(bound.value, size)
    # Of J = -0.5 only the size is known: 1 - 0.5 in place of 1.5.
    assert np.isclose(bound.gradient, size / 0.5)
    assert np.isclose(bound.contraction, 0.5 if size else 0)


def test_a_map_that_is_constant():
    fn = lambda y, b: 0 * y + b
    y, b = jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])
    bound = eqlx.error_bound(_at(y), fn, b)
    assert bound.contraction == 0
    assert np.isclose(bound.value, np.sqrt(5.0))
    assert bound.gradient < 1e-12
    # The adjoint is exact after no step at all, but for what it is told to leave.
    assert np.isclose(eqlx.error_bound(_at(y), fn, b, tolerance=0.1).gradient, 0.1)


def _largest(a, num_steps):
    like = jnp.zeros(a.shape[1], a.dtype), jnp.zeros(a.shape[0], a.dtype)
    entries = bidiagonalise(lambda v: a @ v, lambda v: a.T @ v, like, num_steps)
    return bound_from(entries, a.shape[1])


@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float32, 1e-25), (jnp.float32, 1e25), (jnp.float64, 1.0)]
)
def test_the_largest_singular_value(getkey, dtype, scale):
    eps = float(jnp.finfo(dtype).eps)
    run = jax.jit(_largest, static_argnums=1)
    matrices = [
        jr.normal(getkey(), (20, 7)),
        jr.normal(getkey(), (7, 20)),
        jnp.array([[-3.0]]),
        jnp.diag(jnp.array([2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0])),
        jnp.eye(7, k=1),
        jnp.ones((20, 7)),
        jnp.zeros((20, 7)),
    ]
    # As many steps as there are dimensions, or singular values: exact.
    for a in matrices:
        expected = scale * np.linalg.norm(np.asarray(a), 2)
        got = run((scale * a).astype(dtype), 50)
        assert got.dtype == dtype
        assert abs(float(got) - expected) <= 40 * eps * expected


@pytest.mark.parametrize("size", [3, 40])
def test_the_largest_singular_value_is_not_below_the_true_one(getkey, size):
    matrices = jr.normal(getkey(), (200, size, size)) / np.sqrt(size)
    true = np.linalg.norm(np.asarray(matrices), 2, axis=(1, 2))
    for num_steps in (2, 8, 24):
        run = jax.jit(jax.vmap(ft.partial(_largest, num_steps=num_steps)))
        got = np.asarray(run(matrices))
        # One in a thousand, by its definition. From below it would be all of them.
        assert np.mean(got < true * (1 - 1e-13)) <= 0.01
        if num_steps == 24:
            # Chebyshev's growth: cosh(log(2 / share) / 2k), with share from 1e-3.
            assert np.all(got <= true * np.cosh(np.log(2e3 * size**0.5) / 48))


@pytest.fixture
def _without_checked_types():
    """Users do not have the runtime type checks that the tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


_wrong_calls = {
    "sol": (
        dict(sol=jnp.ones(3)),
        TypeError,
        "`sol` must be an instance of `Solution`",
    ),
    "fn": (dict(fn=3), TypeError, "`fn` must be callable.*got 3"),
    "num_steps": (dict(num_steps=0), ValueError, "`num_steps` .* at least 1; got 0"),
    "fraction": (dict(num_steps=2.5), ValueError, "`num_steps` .*got 2.5"),
    "has_aux": (dict(has_aux=1), TypeError, "`has_aux` must be an instance of `bool`"),
    "pair": (dict(has_aux=True), ValueError, r"`fn` must return a pair `\(y, aux\)`"),
    "shape": (dict(fn=lambda y, _: y[:2]), ValueError, r"`fn` .*got float64\[2\]"),
    "tree": (
        dict(fn=lambda y, _: (y, y)),
        ValueError,
        "`fn` must return the structure",
    ),
    "negative": (dict(tolerance=-1.0), ValueError, "`tolerance` must not be neg.*-1.0"),
    "nan": (dict(tolerance=float("nan")), ValueError, "`tolerance` must not be .*nan"),
    "text": (dict(tolerance="1e-3"), TypeError, "`tolerance` must be a real number"),
    "vector": (dict(tolerance=np.ones(2)), ValueError, r"`tolerance` .*shape \(2,\)"),
}


@pytest.mark.usefixtures("_without_checked_types")
@pytest.mark.parametrize(
    ("kwargs", "kind", "match"), _wrong_calls.values(), ids=list(_wrong_calls)
)
def test_wrong_calls(kwargs, kind, match):
    kwargs = {"sol": _at(jnp.ones(3)), "fn": lambda y, _: 0.5 * y, **kwargs}
    with pytest.raises(kind, match=f"(?s){match}"):
        eqlx.error_bound(**kwargs)
