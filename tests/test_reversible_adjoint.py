"""Steps undone one by one: exact, or said not to be."""

import re

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .conftest import EMITTERS
from .helpers import (
    dense_sensitivity,
    newton,
    optimised_hlo,
    relative_error,
    tanh_cell,
    tanh_problem,
    to_float64,
)


_size = 4
_policies = pytest.mark.parametrize("policy", list(eqlx.OnFailure))


def _unrolled(fn, y0, args, num, beta=0.8, before=None, most=100):
    """The steps written down, for JAX to differentiate."""

    def step(pair, k):
        old, y = pair
        mix = lambda a, f: (1 - beta) * a + beta * f
        new = jax.tree.map(mix, old, fn(y, args))
        choose = lambda a, b: jnp.where(k < num, a, b)
        return jax.tree.map(choose, (y, new), pair), None

    y0 = jax.tree.map(jnp.asarray, y0)
    steps = jnp.arange(num if isinstance(num, int) else most, dtype=jnp.int32)
    return jax.lax.scan(step, (y0 if before is None else before, y0), steps)[0][1]


def _solve(fn, y0, args, num=100, tol=0.0, beta=0.8, adjoint=None, **kwargs):
    adjoint = eqlx.ReversibleAdjoint() if adjoint is None else adjoint
    solver = eqlx.Reversible(0.0, tol, beta=beta)
    return eqlx.fixed_point(
        fn, solver, y0, args, max_steps=num, adjoint=adjoint, **kwargs
    )


def _batch(getkey, num=9):
    """Samples that take from few to many steps to a tolerance of 1e-2."""
    w, _ = tanh_problem(getkey(), _size, 0.7)
    scale = jnp.logspace(-3, 0.5, num)[:, None]
    return w, scale * jr.normal(getkey(), (num, _size))


def _steps_of(solve, xs):
    steps = jax.jit(jax.vmap(lambda x: solve(x).stats["num_steps"]))(xs)
    assert max(steps) > min(steps) + 3
    return steps


@pytest.mark.parametrize("beta", [0.3, 0.8])
@pytest.mark.parametrize("num", [1, 2, 9])
def test_the_gradient_is_that_of_the_steps_unrolled(getkey, beta, num):
    w, x = tanh_problem(getkey(), _size, 0.9)
    y0, c = jr.normal(getkey(), (_size,)), jr.normal(getkey(), (_size,))

    def loss(run):
        # `x` is closed over.
        fn = lambda w, x: lambda y, shift: jnp.tanh(w @ y + x) + shift
        return lambda w, x, y0, shift: jnp.sum(c * run(fn(w, x), y0, shift) ** 2)

    args = (w, x, y0, jnp.array(0.1))
    ours = loss(lambda f, y0, a: _solve(f, y0, a, num, beta=beta).value)
    expected = jax.grad(
        loss(lambda f, y0, a: _unrolled(f, y0, a, num, beta)), (0, 1, 2, 3)
    )(*args)
    got = jax.jit(jax.grad(ours, (0, 1, 2, 3)))(*args)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-10
        assert np.max(np.abs(b)) > 1e-3


@pytest.mark.parametrize("num", [1, 4, 10])
def test_closed_forms_of_a_linear_map(num):
    # (y_{k+1}, y_k) = M (y_k, y_{k-1}) + (beta c, 0).
    a, beta, c, y0 = 0.7, 0.6, 1.3, -0.4
    matrix = np.array([[beta * a, 1 - beta], [1.0, 0.0]])
    powers = [np.linalg.matrix_power(matrix, k) for k in range(num + 1)]
    ys = [y0, y0]
    for _ in range(num):
        ys.append((1 - beta) * ys[-2] + beta * (a * ys[-1] + c))
    # A step taken at `y_k` is carried on by the power of all those after it.
    weights = [powers[num - 1 - k][0, 0] * beta for k in range(num)]
    expected = (powers[num].sum(axis=1)[0], sum(weights), np.dot(weights, ys[1:-1]))

    def solve(y0, c, a):
        fn = lambda y, p: p[0] * y + p[1]
        return _solve(fn, y0, (a, c), num, beta=beta).value

    assert np.isclose(solve(y0, c, a), ys[-1], rtol=1e-13)
    assert np.allclose(jax.grad(solve, (0, 1, 2))(y0, c, a), expected, rtol=1e-9)


def test_at_a_solution_it_is_the_implicit_gradient(getkey):
    args = tanh_problem(getkey(), _size, 0.6)
    z = newton(tanh_cell, jnp.zeros(_size), args)
    dense = jax.tree.map(lambda d: d.sum(0), dense_sensitivity(tanh_cell, z, args))
    start = jnp.zeros(_size)

    def loss(args, y0):
        return jnp.sum(_solve(tanh_cell, y0, args, 100, tol=1e-9, beta=0.5).value)

    got, of_start = jax.jit(jax.grad(loss, (0, 1)))(args, start)
    # Truncated where the solve was, and where the iterates were lost.
    assert relative_error(got, dense) < 1e-6
    assert np.max(np.abs(of_start)) < 1e-6


@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_under_vmap_each_sample_has_its_own_steps(getkey, batching):
    w, xs = _batch(getkey)
    y0 = jr.normal(getkey(), (_size,))
    one = lambda w, x, y0: _solve(
        tanh_cell, y0, (w, x), tol=1e-2, beta=0.5, batching=batching
    )
    steps = _steps_of(lambda x: one(w, x, y0), xs)

    def ours(w, xs, y0):
        ys = jax.vmap(lambda x: one(w, x, y0).value)(xs)
        return jnp.sum(jnp.arange(1.0, 1 + len(xs))[:, None] * ys)

    def reference(w, xs, y0):
        run = lambda x, k: _unrolled(tanh_cell, y0, (w, x), k, 0.5)
        return jnp.sum(jnp.arange(1.0, 1 + len(xs)) * jax.vmap(run)(xs, steps).sum(1))

    got = jax.jit(jax.grad(ours, (0, 1, 2)))(w, xs, y0)
    expected = jax.jit(jax.grad(reference, (0, 1, 2)))(w, xs, y0)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-10
    if batching != eqlx.Staged():
        return
    # The gradient of each, `vmap` outside.
    each = jax.vmap(jax.grad(lambda w, x: jnp.sum(one(w, x, y0).value)), (None, 0))
    alone = jax.grad(
        lambda w: jnp.sum(_unrolled(tanh_cell, y0, (w, xs[3]), steps[3], 0.5))
    )
    assert relative_error(each(w, xs)[3], alone(w)) < 1e-10


def _whole(ys, args):
    w, xs = args
    return jnp.tanh(ys @ w.T + xs)


def test_a_batch_in_one_call(getkey):
    w, xs = _batch(getkey)
    y0 = jr.normal(getkey(), xs.shape)
    run = lambda w, xs, y0: _solve(
        _whole, y0, (w, xs), tol=1e-2, beta=0.5, batch_axis=0
    )
    steps = run(w, xs, y0).stats["num_steps"]
    assert max(steps) > min(steps) + 3

    def reference(w, xs, y0):
        run = lambda x, y, k: _unrolled(tanh_cell, y, (w, x), k, 0.5)
        return jnp.sum(jax.vmap(run)(xs, y0, steps))

    loss = lambda *args: jnp.sum(run(*args).value)
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(w, xs, y0)
    expected = jax.jit(jax.grad(reference, (0, 1, 2)))(w, xs, y0)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-10


def _sharded(fn, axis_type, in_specs, out_specs):
    mesh = jax.make_mesh((8,), ("b",), axis_types=(axis_type,))
    run = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    return run, lambda *xs: [place(x, s) for x, s in zip(xs, in_specs, strict=True)]


def _scaled_cell(y, args):
    """Some of what is the same on all devices is made of it by functions of JAX."""
    w, scale, x = args
    w = w * jax.nn.softplus(scale) / jnp.linalg.norm(w)
    return jnp.where(y > 5, y, jnp.tanh(w @ y + jax.nn.relu(scale) * x))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_in_shard_map_with_its_types_checked(getkey, axis_type):
    w, xs = _batch(getkey, 16)
    scale, y0 = jnp.array(0.7), jr.normal(getkey(), (_size,))
    one = lambda w, s, x: _solve(
        _scaled_cell, y0, (w, s, x), tol=1e-2, beta=0.5, throw=False
    )
    steps = _steps_of(lambda x: one(w, scale, x), xs)

    def reference(w, scale, xs):
        run = lambda x, k: _unrolled(_scaled_cell, y0, (w, scale, x), k, 0.5)
        return jnp.sum(jax.vmap(run)(xs, steps))

    def local(w, scale, xs):
        return jnp.sum(jax.vmap(lambda x: one(w, scale, x).value)(xs))

    specs = (P(), P(), P("b"))
    grad = jax.grad(local, (0, 1, 2))
    inside, put = _sharded(grad, axis_type, specs, specs)
    total, _ = _sharded(
        lambda *args: jax.lax.psum(local(*args), "b"), axis_type, specs, P()
    )
    args = put(w, scale, xs)
    expected = jax.jit(jax.grad(reference, (0, 1, 2)))(w, scale, xs)
    outside = jax.jit(jax.grad(total, (0, 1, 2)))
    for run in (inside, outside) if axis_type == AxisType.Auto else (inside,):
        for a, b in zip(run(*args), expected, strict=True):
            assert relative_error(np.asarray(a), b) < 1e-10
    # One sum over the devices for each of the two, and none in a loop: such a one would
    # stand in a computation of its own, not in the main one.
    text = str(inside.lower(*args).compile().as_text())
    reduces = re.findall(r"^ .*all-reduce\(", text.split("\nENTRY ")[0], re.MULTILINE)
    assert not reduces
    assert "all-reduce(" in text.split("\nENTRY ")[1]


def test_what_cannot_be_taken_out_of_the_loop_in_shard_map_is_said(getkey):
    w, xs = _batch(getkey, 8)

    def cell(y, args):
        layer = lambda y, w: (jnp.tanh(w @ y + args[1]), None)
        return jax.lax.scan(layer, y, args[0][None])[0]

    def local(cast):
        def fn(w, xs):
            w = jax.lax.pcast(w, "b", to="varying") if cast else w
            run = lambda x: _solve(cell, 0 * x, (w, x), 6, throw=False).value
            return jnp.sum(run(xs[0]))

        return jax.grad(fn)

    specs = (P(), P("b"))
    run, put = _sharded(local(False), AxisType.Auto, specs, P())
    with pytest.raises(ValueError, match=r"`scan`.*\n?.*pcast"):
        run(*put(w, xs))
    run, put = _sharded(local(True), AxisType.Auto, specs, P())
    reference = lambda w: sum(
        jnp.sum(_unrolled(tanh_cell, 0 * x, (w, x), 6)) for x in xs
    )
    assert relative_error(run(*put(w, xs)), jax.grad(reference)(w)) < 1e-10


def test_memory_does_not_depend_on_the_steps(getkey):
    n = 64
    args = tanh_problem(getkey(), n, 0.8, jnp.float32)

    def temporary(num):
        def loss(args, y0):
            run = _solve(tanh_cell, y0, args, num, 1e-6, throw=False)
            return jnp.sum(run.value)

        y0 = jnp.zeros(n, jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(args, y0).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    ours = [temporary(num) for num in (10, 1000)]
    assert ours[0] == ours[1]
    # A few copies of the parameters, the gradient itself not counted.
    assert ours[0] < 4 * n * n * 4


def test_one_evaluation_a_step_and_no_callback(getkey):
    args = tanh_problem(getkey(), _size, 0.8)
    fn = lambda y, p: jnp.tanh(p[0] @ y + p[1])
    loss = lambda args: _solve(fn, jnp.zeros(_size), args, 9, throw=False).value.sum()
    text = optimised_hlo(jax.grad(loss), args)
    assert text.count(" tanh(") == 2  # One in either loop.
    assert "custom-call" not in text


# A map with the eigenvalues 0.999 and 0: on the way back an error grows by more than
# nine a step at `beta=0.9`, and the cotangent does not fall.
def _stiff(y, a):
    return jnp.array([0.999, 0.0], y.dtype) * y * a + 0.3


def _stiff_loss(a, num, monitor=None, **kwargs):
    start = jnp.ones(2, jnp.float32)
    run = _solve(_stiff, start, a, num, beta=0.9, monitor=monitor, **kwargs)
    return jnp.sum(run.value)


def test_a_drifted_reconstruction_raises():
    a = jnp.array(1.0, jnp.float32)
    assert jnp.isfinite(jax.grad(_stiff_loss)(a, 4))
    with pytest.raises(Exception, match=r"reconstruction has drifted(.|\n)*float64"):
        jax.block_until_ready(jax.grad(_stiff_loss)(a, 60))
    many = lambda a: jnp.sum(jax.vmap(lambda a: _stiff_loss(a, 60))(a))
    with pytest.raises(Exception, match=r"failed for 3 of 3 samples"):
        jax.block_until_ready(jax.grad(many)(jnp.full(3, a)))


@_policies
@pytest.mark.parametrize("num", [12, 60, 1000])
def test_a_drifted_reconstruction_meets_its_policy_and_is_counted(policy, num):
    a = jnp.array(1.0, jnp.float32)
    loss = lambda a, m: _stiff_loss(
        a, num, m, throw=False, adjoint=eqlx.ReversibleAdjoint(on_failure=policy)
    )
    got, seen = jax.jit(jax.grad(loss, (0, 1)))(a, eqlx.AdjointMonitor())
    assert seen.num_solves == 1
    assert seen.num_failed == 1
    assert 0.01 < seen.residual < 10
    assert 5 <= seen.num_steps <= min(num, 16)
    if policy is eqlx.OnFailure.zero:
        assert got == 0
    elif policy is eqlx.OnFailure.nan:
        assert jnp.isnan(got)
    else:
        assert jnp.isfinite(got)
        assert got != 0


def test_a_sample_that_drifts_harms_no_other():
    # The first stops at its tolerance after few steps, the second does not.
    rates = jnp.array([0.05, 1.0, 0.1], jnp.float32)
    shared = jnp.array(1.0, jnp.float32)
    start = jnp.ones(2, jnp.float32)

    def one(a, s):
        fn = lambda y, p: _stiff(y, p[0] * p[1])
        run = _solve(fn, start, (a, s), 60, 1e-4, beta=0.9, throw=False)
        return jnp.sum(run.value)

    def whole(rates, s):
        fn = lambda y, p: jax.vmap(_stiff)(y, p[0] * p[1])
        return jnp.sum(
            _solve(
                fn,
                jnp.ones((3, 2), jnp.float32),
                (rates, s),
                60,
                1e-4,
                beta=0.9,
                throw=False,
                batch_axis=0,
            ).value
        )

    alone = [jax.grad(one, (0, 1))(rates[i], shared) for i in range(3)]
    assert alone[1][0] == 0
    assert alone[0][0] > 1e-3
    vmapped = lambda r, s: jnp.sum(jax.vmap(one, (0, None))(r, s))
    for loss in (vmapped, whole):
        got, of_shared = jax.jit(jax.grad(loss, (0, 1)))(rates, shared)
        assert np.allclose(got, [a[0] for a in alone], rtol=1e-5)
        assert np.allclose(of_shared, sum(a[1] for a in alone), rtol=1e-5)
        assert got[1] == 0


def _rooted(y, p):
    # What is under the root is small beside the first element: on the way back it turns
    # negative long before anything is large.
    first = jnp.arange(8) == 0
    a, b = p
    shift = jnp.where(first, 1.0, 1e-3).astype(y.dtype)
    root = jnp.where(first, 0.1 * y, 0.01 * b * jnp.sqrt(y))
    return shift + 0.3 * a * y + root.astype(y.dtype)


def _rooted_start(dtype=jnp.float32):
    return jnp.linspace(2e-3, 4e-3, 8, dtype=dtype).at[0].set(3)


@_policies
@pytest.mark.parametrize("batch", [False, True])
def test_an_fn_that_leaves_its_domain_on_the_way_back(policy, batch):
    adjoint = eqlx.ReversibleAdjoint(on_failure=policy)

    def loss(a, m, y0):
        run = _solve(
            jax.vmap(_rooted, (0, None)) if batch else _rooted,
            y0[None] if batch else y0,
            (a, jnp.array(1.0, jnp.float32)),
            60,
            throw=False,
            adjoint=adjoint,
            monitor=m,
            batch_axis=0 if batch else None,
        )
        return jnp.sum(run.value)

    a = jnp.array(0.9, jnp.float32)
    grad = jax.grad(loss, (0, 1, 2))
    got, seen, of_start = grad(a, eqlx.AdjointMonitor(), _rooted_start())
    y0 = _rooted_start(jnp.float64)
    unrolled = lambda a: jnp.sum(_unrolled(_rooted, y0, (a, jnp.array(1.0)), 60))
    assert np.isclose(got, jax.grad(unrolled)(0.9), rtol=1e-3)
    # It did come there, and ended in time.
    assert 10 < seen.num_steps < 60
    assert seen.num_failed == 0
    assert np.all(of_start == 0)


def test_what_is_no_number_of_one_sample_is_not_added_to_what_they_share():
    y0 = jnp.stack([_rooted_start(), _rooted_start()])
    other = lambda y, b: 0.5 + 0.3 * b * y

    def fn(y, b):
        a = jnp.array(0.9, jnp.float32)
        return jnp.stack([_rooted(y[0], (a, b)), other(y[1], b)])

    def loss(b, m, policy):
        adjoint = eqlx.ReversibleAdjoint(jnp.inf, policy)
        run = _solve(
            fn, y0, b, 60, adjoint=adjoint, monitor=m, throw=False, batch_axis=0
        )
        return jnp.sum(run.value)

    b = jnp.array(1.0, jnp.float32)
    start = _rooted_start(jnp.float64)
    expected = jax.grad(lambda b: jnp.sum(_unrolled(other, start, b, 60)))(1.0)
    for policy in (eqlx.OnFailure.zero, eqlx.OnFailure.keep):
        grad = lambda b, m, policy=policy: jax.grad(loss, (0, 1))(b, m, policy)
        got, seen = jax.jit(grad, compiler_options=EMITTERS)(b, eqlx.AdjointMonitor())
        assert seen.num_failed == 1
        assert np.isclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(jnp.bfloat16, 0.5), (jnp.float32, 1e-2), (jnp.float64, 1e-7)],
    ids=["bfloat16", "float32", "float64"],
)
@pytest.mark.parametrize("gain", [0.5, 0.9])
def test_the_estimate_is_the_error(getkey, dtype, bound, gain):
    # From rounding alone to iterates that are lost, over sixteen orders of magnitude.
    size = 32
    w, x = tanh_problem(getkey(), size, gain, dtype)
    c = jr.normal(getkey(), (size,))
    adjoint = eqlx.ReversibleAdjoint(max_error=jnp.inf)

    # Far from the solution, whose size is the one that counts.
    start = 20 * x

    def ours(w, monitor, beta, num):
        run = _solve(
            tanh_cell,
            start,
            (w, x),
            num,
            beta=beta,
            adjoint=adjoint,
            monitor=monitor,
            throw=False,
        )
        return jnp.sum(c * run.value.astype(jnp.float64))

    def compare(beta, num):
        got, seen = jax.grad(ours, (0, 1))(w, eqlx.AdjointMonitor(), beta, num)
        exact = lambda w: jnp.sum(
            c * _unrolled(tanh_cell, to_float64(start), (w, to_float64(x)), num, beta)
        )
        expected = jax.grad(exact)(to_float64(w))
        difference = to_float64(got) - expected
        error = jnp.max(jnp.abs(difference)) / jnp.max(jnp.abs(expected))
        return error, seen.residual, got

    for num in (4, 24):
        betas = jnp.array([0.5, 0.8, 0.9])
        error, estimate, got = jax.jit(
            jax.vmap(lambda b: compare(b, num))  # noqa: B023
        )(betas)
        assert got.dtype == dtype
        error, estimate = np.asarray(error), np.asarray(estimate)
        assert np.all(error < bound)
        # And no less than the rounding of the forward pass and of the sums.
        floor = float(jnp.finfo(dtype).eps)
        assert np.all(error < 30 * estimate + floor)
        assert np.all(estimate < 5 * error + floor)


def test_a_solve_out_of_steps_has_the_derivative_of_its_best_iterate(getkey):
    w, x = tanh_problem(getkey(), _size, 0.9)
    y0 = jr.normal(getkey(), (_size,))

    def loss(w, y0):
        run = _solve(tanh_cell, y0, (w, x), 7, 1e-9, throw=False)
        return jnp.sum(run.value**2), run.result

    (got, result) = jax.grad(loss, (0, 1), has_aux=True)(w, y0)
    assert result == eqlx.RESULTS.max_steps_reached
    reference = lambda w, y0: jnp.sum(_unrolled(tanh_cell, y0, (w, x), 7) ** 2)
    expected = jax.grad(reference, (0, 1))(w, y0)
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("batch", [False, True])
def test_a_best_iterate_that_is_not_the_last(batch):
    # One part nears its fixed point, the other leaves its own.
    fn = lambda y, a: a * jnp.broadcast_to(jnp.array([0.3, 1.2]), y.shape) * y
    y0, a, num = jnp.array([1.0, 1e-2]), 0.95, 14
    iterates = [_unrolled(fn, y0, a, k) for k in range(num + 1)]
    sizes = [float(jnp.max(jnp.abs(fn(y, a) - y))) for y in iterates]
    best = int(np.argmin(sizes))
    assert 2 < best < num - 2
    weights = jnp.array([1.0, -3.0])

    def solve(a, y0, m):
        y0 = y0[None] if batch else y0
        run = _solve(
            fn,
            y0,
            a,
            num,
            1e-12,
            throw=False,
            monitor=m,
            batch_axis=0 if batch else None,
        )
        return jnp.sum(weights * run.value.reshape(2))

    args = (jnp.array(a), y0, eqlx.AdjointMonitor())
    assert np.isclose(solve(*args), jnp.sum(weights * iterates[best]), rtol=1e-12)
    *got, seen = jax.grad(solve, (0, 1, 2))(*args)
    of_best = lambda a, y0: jnp.sum(weights * _unrolled(fn, y0, a, best))
    expected = jax.grad(of_best, (0, 1))(a, y0)
    for b, c in zip(got, expected, strict=True):
        assert relative_error(b, c) < 1e-10
    assert seen.num_steps == best


@pytest.mark.parametrize("last", [0, 3])
def test_a_solve_that_left_the_domain_of_fn(last):
    # The fourth iterate is 2.78.
    def fn(y, a):
        return jnp.where(y > last - 0.5, jnp.nan, 1.0) * (a * y + 1)

    def loss(a, y0, m):
        run = _solve(fn, y0, a, 20, 1e-9, throw=False, monitor=m)
        return run.value, run.result

    args = (jnp.array(1.0), jnp.array(0.0), eqlx.AdjointMonitor())
    (*got, seen), result = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
    assert result == eqlx.RESULTS.nonfinite
    num = int(seen.num_steps)
    assert num == (0 if last == 0 else 4)
    safe = lambda y, a: a * y + 1
    expected = jax.grad(lambda a, y0: _unrolled(safe, y0, a, num), (0, 1))(1.0, 0.0)
    assert np.allclose(got, expected, rtol=1e-9)


def test_a_cotangent_that_is_no_number_stays_one():
    # It is not the way back that failed.
    loss = lambda a: jnp.nan * _solve(lambda y, a: a * y + 1, 0.0, a, 5).value
    assert jnp.isnan(jax.grad(loss)(0.5))


def test_complex_numbers_and_structured_states():
    y0 = {"a": jnp.array([0.1 + 0.2j, -0.3j]), "b": jnp.array(0.5)}
    q = jnp.array([[0.1 + 0.2j, 0.5], [0.0, 0.3j]])

    def fn(y, p):
        a = p["q"] @ y["a"] + jnp.conj(y["a"]) * 0.1 + y["b"].astype(q.dtype)
        b = 0.3 * jnp.abs(y["a"][0]) ** 2 + p["r"] * jnp.sin(y["b"])
        return {"a": jnp.sin(a), "b": b}

    def loss(run):
        def of(p, y0):
            y = run(fn, y0, p)
            return jnp.sum(jnp.abs(y["a"] - 1) ** 2) + y["b"]

        return jax.grad(of, (0, 1))

    p = {"q": q, "r": jnp.array(0.4)}
    got = loss(lambda *args: _solve(*args, num=8).value)(p, y0)
    expected = loss(lambda *args: _unrolled(*args, num=8))(p, y0)
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-10
    # Without a part of the state.
    half = jax.grad(lambda p: _solve(fn, y0, p, 8).value["b"])(p)
    assert (
        relative_error(half, jax.grad(lambda p: _unrolled(fn, y0, p, 8)["b"])(p))
        < 1e-10
    )


def test_args_may_hold_anything():
    args = dict(
        a=jnp.array(1.0),
        k=jnp.array(2),
        mask=jnp.array([True]),
        none=None,
        name="cos",
        number=0.5,
        nested=[None, jnp.array(1.0)],
        key=jr.key(0),
    )

    def fn(y, p):
        noise = jr.normal(p["key"], ()) if "key" in p else 0.0
        factor = jnp.where(p["k"] > 1, 1.0, 2.0)
        return jnp.cos(p["a"] * y) * factor * p["nested"][1] + 0.1 * noise

    loss = lambda run: lambda a: run(fn, jnp.array(0.5), {**args, "a": a})
    got = jax.grad(loss(lambda *args: _solve(*args, num=9).value))(args["a"])
    expected = jax.grad(loss(lambda *args: _unrolled(*args, num=9)))(args["a"])
    assert np.isclose(got, expected, rtol=1e-10)
    arrays = {k: v for k, v in args.items() if k not in ("name", "key")}
    of_tree = lambda run: lambda p: run(fn, jnp.array(0.5), p)
    got = jax.grad(of_tree(lambda *args: _solve(*args, num=9).value), allow_int=True)(
        arrays
    )
    expected = jax.grad(of_tree(lambda *args: _unrolled(*args, num=9)), allow_int=True)(
        arrays
    )
    assert got["k"].dtype == jax.dtypes.float0
    for name in ("a", "number"):
        assert np.isclose(got[name], expected[name], rtol=1e-10)
    assert np.isclose(got["nested"][1], expected["nested"][1], rtol=1e-10)


def test_a_traced_weight_and_tolerance():
    fn = lambda y, a: jnp.cos(a * y)

    def loss(a, beta, tol):
        return _solve(fn, jnp.array(0.5), a, 9, tol=tol, beta=beta, throw=False).value

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(1.0, 0.6, 0.0)
    expected = jax.grad(lambda a: _unrolled(fn, jnp.array(0.5), a, 9, 0.6))(1.0)
    assert np.isclose(got[0], expected, rtol=1e-10)
    assert got[1] == got[2] == 0


def test_a_state_that_was_handed_in_has_no_derivative():
    fn = lambda y, a: jnp.cos(a * y)
    first = _solve(fn, jnp.array(0.5), 1.0, 4)
    before = first.state.previous

    def loss(run):
        return jax.grad(run, (0, 1))(1.0, first.value)

    got = loss(lambda a, y0: _solve(fn, y0, a, 6, state=first.state).value)
    expected = loss(lambda a, y0: _unrolled(fn, y0, a, 6, before=before))
    assert np.allclose(got, expected, rtol=1e-10)

    # One that takes no step has nowhere to drift, wherever the state came from.
    def loss_of(a, y0, m):
        run = _solve(fn, y0, a, 6, tol=9.0, state=first.state, monitor=m)
        return run.value

    got = jax.grad(loss_of, (0, 1, 2))(1.0, first.value, eqlx.AdjointMonitor())
    assert got[:2] == (0, 1)
    assert got[2].num_steps == got[2].residual == 0


def test_gradients_flow_through_aux_and_layers(getkey):
    cell = eqx.nn.MLP(_size, _size, 6, 1, key=getkey(), dtype=jnp.float64)
    x = jr.normal(getkey(), (_size,))
    fn = lambda z, x: 0.3 * jax.vmap(lambda z: cell(z + x))(z[None])[0]

    class Layered(eqx.Module):
        cell: eqx.nn.MLP

        def __call__(self, z, x):
            return 0.3 * self.cell(z + x)

    def loss(model, x):
        layer = eqlx.nn.FixedPointLayer(
            model,
            eqlx.Reversible(0.0, 0.0),
            max_steps=7,
            adjoint=eqlx.ReversibleAdjoint(),
        )
        return jnp.sum(layer(x) ** 2)

    got = eqx.filter_grad(loss)(Layered(cell), x)
    expected = eqx.filter_grad(
        lambda m, x: jnp.sum(_unrolled(m, jnp.zeros(_size), x, 7) ** 2)
    )(Layered(cell), x)
    assert (
        relative_error(
            eqx.filter(got, eqx.is_array), eqx.filter(expected, eqx.is_array)
        )
        < 1e-10
    )

    def of_aux(x):
        run = _solve(lambda z, x: (fn(z, x), z * x), 0 * x, x, 7, has_aux=True)
        return jnp.sum(run.aux)

    unrolled = lambda x: jnp.sum(_unrolled(fn, jnp.zeros(_size), x, 7) * x)
    assert relative_error(jax.grad(of_aux)(x), jax.grad(unrolled)(x)) < 1e-10


def test_a_monitor_sums_over_a_batch_and_has_the_figures_of_each(getkey):
    w, xs = _batch(getkey, 5)
    one = lambda x, m: _solve(
        tanh_cell, jnp.zeros(_size), (w, x), tol=1e-2, beta=0.5, monitor=m
    )
    steps = _steps_of(lambda x: one(x, None), xs)
    total = lambda m: jnp.sum(jax.vmap(lambda x: one(x, m).value)(xs))
    seen = jax.grad(total)(eqlx.AdjointMonitor())
    assert (seen.num_solves, seen.num_steps, seen.num_failed) == (5, int(sum(steps)), 0)
    assert 0 < seen.residual < 1e-9
    each = jax.vmap(jax.grad(lambda m, x: jnp.sum(one(x, m).value)), (None, 0))
    assert each(eqlx.AdjointMonitor(), xs).num_steps.tolist() == steps.tolist()
    whole = lambda m: jnp.sum(
        _solve(
            _whole, 0 * xs, (w, xs), tol=1e-2, beta=0.5, monitor=m, batch_axis=0
        ).value
    )
    seen = jax.grad(whole)(eqlx.AdjointMonitor(solution=xs))
    assert (seen.num_solves, seen.num_steps, seen.num_failed) == (5, int(sum(steps)), 0)
    assert jnp.all(seen.solution == 0)


def test_wrong_calls():
    with pytest.raises(TypeError, match=r"Anderson.*\n?.*RecursiveCheckpointAdjoint"):
        eqlx.fixed_point(
            lambda y, _: y,
            eqlx.Anderson(0.0, 1e-3),
            jnp.ones(2),
            adjoint=eqlx.ReversibleAdjoint(),
        )
    with pytest.raises(ValueError, match="`max_error`"):
        eqlx.ReversibleAdjoint(max_error=-1.0)
    with pytest.raises(TypeError, match="on_failure"):
        eqlx.ReversibleAdjoint(on_failure="zero")  # pyright: ignore
    solve = lambda a: _solve(lambda y, a: a * y + 1, 0.0, a, 5).value
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(solve, (0.5,), (1.0,))
