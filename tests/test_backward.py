"""The backward solve speaks: its status, its figures, its policy, its start."""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import newton, optimised_hlo, relative_error, tanh_cell, tanh_problem


_SIZE = 6
_PICARD = eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, 1e-10))


def _case(getkey, gain=0.8):
    """A problem, its solution, and the adjoint of a cotangent, all dense."""
    w, x = tanh_problem(getkey(), _SIZE, gain)
    z = newton(tanh_cell, jnp.zeros(_SIZE), (w, x))
    cotangent = jr.normal(getkey(), (_SIZE,))
    matrix = np.eye(_SIZE) - np.diag(1 - np.asarray(z) ** 2) @ np.asarray(w)
    return w, x, z, cotangent, np.linalg.solve(matrix.T, cotangent)


def _picard_steps(w, z, cotangent, tol):
    """Steps of `u = J^T u + v` from `u = v`, for a cotangent of size one."""
    jacobian = np.diag(1 - np.asarray(z) ** 2) @ np.asarray(w)
    v = np.asarray(cotangent) / np.max(np.abs(cotangent))
    u, num = v, 0
    while np.max(np.abs(jacobian.T @ u + v - u)) >= tol:
        u, num = jacobian.T @ u + v, num + 1
    return num


def _loss(z, cotangent):
    return jnp.sum(z * cotangent)


def _solve(w, x, monitor=None, adjoint=eqlx.ImplicitAdjoint(_PICARD), **kwargs):  # noqa: B008
    return eqlx.fixed_point(
        tanh_cell,
        eqlx.Anderson(0.0, 1e-12),
        jnp.zeros(_SIZE, x.dtype),
        (w, x),
        adjoint=adjoint,
        monitor=monitor,
        throw=False,
        **kwargs,
    ).value


def test_the_adjoint_solve_is_the_dense_one_and_tells_how_it_went(getkey):
    w, x, z, cotangent, expected = _case(getkey)
    for adjoint in (
        eqlx.ImplicitAdjoint(),
        eqlx.ImplicitAdjoint(_PICARD),
        eqlx.ImplicitAdjoint(lx.LU()),
    ):
        sol = eqlx.solve_adjoint(
            tanh_cell,
            eqlx.Anderson(0.0, 1e-10),
            z,
            cotangent,
            (w, x),
            adjoint=adjoint,
        )
        assert relative_error(sol.value, expected) < 1e-9
        assert sol.result == eqlx.RESULTS.successful
        assert sol.stats["is_usable"]
        jacobian = np.diag(1 - np.asarray(z) ** 2) @ np.asarray(w)
        residual = cotangent - (sol.value - jacobian.T @ sol.value)
        assert np.allclose(sol.stats["residual"], np.max(np.abs(residual)), atol=1e-14)
    sol = eqlx.solve_adjoint(
        tanh_cell,
        eqlx.Anderson(0.0, 1e-10),
        z,
        cotangent,
        (w, x),
        adjoint=eqlx.ImplicitAdjoint(_PICARD),
    )
    assert sol.stats["num_steps"] == _picard_steps(w, z, cotangent, 1e-10)


def test_the_adjoint_solve_of_a_batch_and_of_a_tree(getkey):
    w, x, z, cotangent, expected = _case(getkey)
    solver = eqlx.Anderson(0.0, 1e-10)
    cts = jnp.stack([cotangent, jnp.zeros(_SIZE), -2 * cotangent])
    one = lambda ct: eqlx.solve_adjoint(tanh_cell, solver, z, ct, (w, x))
    sol = jax.vmap(one)(cts)
    assert (
        relative_error(sol.value, np.stack([expected, 0 * expected, -2 * expected]))
        < 1e-9
    )
    assert sol.stats["num_steps"][1] == 0

    def of_batch(zs, args):
        return jnp.tanh(zs @ args[0].T + args[1][None])

    zs = jnp.stack([z, z, z])
    sol = eqlx.solve_adjoint(of_batch, solver, zs, cts, (w, x), batch_axis=0)
    assert relative_error(sol.value[2], -2 * expected) < 1e-9
    assert sol.stats["num_steps"][1] == 0

    def of_tree(tree, args):
        out = tanh_cell(jnp.concatenate([tree["a"], tree["b"]]), args)
        return {"a": out[:2], "b": out[2:]}, "aux"

    tree = lambda v: {"a": v[:2], "b": v[2:]}
    sol = eqlx.solve_adjoint(
        of_tree, solver, tree(z), tree(cotangent), (w, x), has_aux=True
    )
    assert relative_error(sol.value, tree(jnp.asarray(expected))) < 1e-9


def test_the_adjoint_of_a_complex_map_is_the_cotangent_of_jax():
    q = jnp.array([[0.1 + 0.2j, 0.5], [0.0, 0.3j]])
    ct = jnp.array([1.0 - 2j, 0.5j])
    fn = lambda y, b: q @ y + b
    sol = eqlx.solve_adjoint(
        fn, eqlx.Anderson(0.0, 1e-12), jnp.zeros(2, complex), ct, ct
    )
    dense = lambda b: jnp.linalg.solve(jnp.eye(2) - q, b)
    with jax.numpy_dtype_promotion("standard"):
        (expected,) = jax.vjp(dense, ct)[1](ct)
    assert relative_error(sol.value, expected) < 1e-10


def test_the_adjoint_solve_raises_or_reports(getkey):
    w, x, z, cotangent, _ = _case(getkey)
    adjoint = eqlx.ImplicitAdjoint(
        eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, 1e-10), max_steps=3)
    )
    run = lambda throw: eqlx.solve_adjoint(
        tanh_cell,
        eqlx.Anderson(0.0, 1e-10),
        z,
        cotangent,
        (w, x),
        adjoint=adjoint,
        throw=throw,
    )
    sol = run(throw=False)
    assert sol.result == eqlx.RESULTS.max_steps_reached
    assert not sol.stats["is_usable"]
    assert sol.stats["num_steps"] == 3
    with pytest.raises(eqx.EquinoxRuntimeError, match="max_steps_reached"):
        run(throw=True)


def test_a_monitor_collects_what_the_backward_pass_did(getkey):
    w, x, z, cotangent, expected = _case(getkey)
    steps = [_picard_steps(w, z, cotangent, 1e-10)]
    loss = lambda x, m: _loss(_solve(w, x, m), cotangent)
    grad, seen = jax.jit(jax.grad(loss, (0, 1)))(x, eqlx.AdjointMonitor())
    assert relative_error(grad, (1 - z**2) * expected) < 1e-8
    assert (seen.num_solves, seen.num_steps, seen.num_failed) == (1, steps[0], 0)
    assert 0 < seen.residual < 1e-10

    # Summed over a batch, each sample with a Jacobian and steps of its own.
    xs = jnp.stack([x, x + 1, 0 * x])
    zs = [newton(tanh_cell, jnp.zeros(_SIZE), (w, x)) for x in xs]
    steps = [_picard_steps(w, z, cotangent, 1e-10) for z in zs]
    assert len(set(steps)) > 1
    total = lambda xs, m: jnp.sum(jax.vmap(lambda x: loss(x, m))(xs))
    _, seen = jax.jit(jax.grad(total, (0, 1)))(xs, eqlx.AdjointMonitor())
    assert (seen.num_solves, seen.num_steps) == (3, sum(steps))
    # One for each sample.
    each = jax.vmap(lambda x, m: loss(x, m))
    many = jax.vmap(lambda _: eqlx.AdjointMonitor())(xs)
    _, seen = jax.grad(lambda xs, m: jnp.sum(each(xs, m)), (0, 1))(xs, many)
    assert seen.num_steps.tolist() == steps


def test_a_monitor_of_half_precision_counts_beyond_it(getkey):
    # bfloat16 has no number between 256 and 258.
    xs = jnp.zeros((257, 2), jnp.bfloat16)

    def loss(a, monitor):
        def one(x):
            fn = lambda z, a: a * z + x + 1
            solver = eqlx.FixedPointIteration(1e-2, 1e-2)
            return eqlx.fixed_point(
                fn, solver, x, a, monitor=monitor, throw=False
            ).value

        return jnp.sum(jax.vmap(one)(xs).astype(jnp.float32))

    grads = jax.grad(loss, (0, 1))
    _, seen = grads(jnp.array(0.25, jnp.bfloat16), eqlx.AdjointMonitor())
    assert seen.num_solves == 257
    assert seen.num_failed == 0


def test_a_monitor_changes_no_derivative(getkey):
    w, x, _, cotangent, _ = _case(getkey)
    plain = lambda x: _loss(_solve(w, x), cotangent)
    watched = lambda x, m: _loss(_solve(w, x, m), cotangent)
    m = eqlx.AdjointMonitor(solution=jnp.zeros(_SIZE))
    expected = jax.jit(jax.hessian(plain))(x)
    for second in (jax.jacfwd, jax.jacrev):
        hessian = jax.jit(second(lambda x: jax.grad(watched, (0, 1))(x, m)[0]))(x)
        assert relative_error(hessian, expected) < 1e-7
    t = jax.jvp(lambda x: watched(x, m), (x,), (x,))[1]
    assert jnp.allclose(t, jax.grad(plain)(x) @ x, rtol=1e-9)
    ones = jax.tree.map(jnp.ones_like, m)
    assert jax.jvp(lambda m: watched(x, m), (m,), (ones,))[1] == 0


def test_a_monitor_in_shard_map_sums_over_the_devices(getkey):
    w, x, _, cotangent, _ = _case(getkey)
    xs = jnp.linspace(0, 2, 8)[:, None] * x[None]
    zs = [newton(tanh_cell, jnp.zeros(_SIZE), (w, x)) for x in xs]
    steps = [_picard_steps(w, z, cotangent, 1e-10) for z in zs]

    def local(xs, monitor):
        loss = lambda xs, m: jnp.sum(
            jax.vmap(lambda x: _loss(_solve(w, x, m), cotangent))(xs)
        )
        return jax.grad(loss, 1)(xs, monitor)

    mesh = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(local, mesh=mesh, in_specs=(P("b"), P()), out_specs=P())
    seen = jax.jit(run)(xs, eqlx.AdjointMonitor())
    assert (seen.num_solves, seen.num_steps) == (8, sum(steps))


def test_a_monitor_needs_no_callback(getkey):
    w, x, _, cotangent, _ = _case(getkey)
    loss = lambda x, m: _loss(_solve(w, x, m), cotangent)
    text = optimised_hlo(jax.grad(loss, (0, 1)), x, eqlx.AdjointMonitor())
    assert "custom-call" not in text


def test_the_last_solution_is_a_start_that_saves_steps(getkey):
    w, x, z, cotangent, expected = _case(getkey, gain=0.95)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver())
    loss = lambda x, m: _loss(_solve(w, x, m, adjoint), cotangent)
    grad = jax.jit(jax.grad(loss, (0, 1)))
    zero = eqlx.AdjointMonitor(solution=jnp.zeros(_SIZE))
    _, cold = grad(x, zero)
    assert relative_error(cold.solution, expected) < 1e-9
    again, warm = grad(x, cold)
    assert warm.num_steps <= 1
    assert relative_error(again, (1 - z**2) * expected) < 1e-9
    near, nearby = grad(x + 1e-4, cold)
    assert nearby.num_steps < 0.8 * cold.num_steps
    assert relative_error(near, grad(x + 1e-4, zero)[0]) < 1e-9
    # A start that is far off, or not even finite, costs nothing but a product.
    for bad in (1e6, jnp.nan, jnp.inf):
        start = eqlx.AdjointMonitor(solution=jnp.full(_SIZE, bad))
        got, seen = grad(x, start)
        assert relative_error(got, (1 - z**2) * expected) < 1e-9
        assert seen.num_steps == cold.num_steps


def test_a_start_for_each_sample_of_a_batch(getkey):
    w, x, _, cotangent, _ = _case(getkey)
    xs = jnp.stack([x, x + 1, -x])
    adjoint = eqlx.ImplicitAdjoint()

    def loss(xs, solutions):
        def one(x, solution):
            m = eqlx.AdjointMonitor(solution=solution)
            return _loss(_solve(w, x, m, adjoint), cotangent)

        return jnp.sum(jax.vmap(one)(xs, solutions))

    grad = jax.grad(loss, (0, 1))
    expected, solutions = grad(xs, jnp.zeros((3, _SIZE)))
    for z_x, u in zip(xs, solutions, strict=True):
        z = newton(tanh_cell, jnp.zeros(_SIZE), (w, z_x))
        matrix = np.eye(_SIZE) - np.diag(1 - np.asarray(z) ** 2) @ np.asarray(w)
        assert relative_error(u, np.linalg.solve(matrix.T, cotangent)) < 1e-9
    assert relative_error(grad(xs, solutions)[0], expected) < 1e-9

    def of_batch(xs, monitor):
        fn = lambda zs, xs: jnp.tanh(zs @ w.T + xs)
        solver = eqlx.Anderson(0.0, 1e-12)
        sol = eqlx.fixed_point(
            fn, solver, jnp.zeros((3, _SIZE)), xs, batch_axis=0, monitor=monitor
        )
        return jnp.sum(sol.value * cotangent[None])

    monitor = eqlx.AdjointMonitor(solution=jnp.zeros((3, _SIZE)))
    got, seen = jax.grad(of_batch, (0, 1))(xs, monitor)
    assert relative_error(got, expected) < 1e-9
    assert relative_error(seen.solution, solutions) < 1e-9
    assert seen.num_solves == 3


def _two(fn_rates, on_failure, throw=False):
    """The gradient of two samples, of which the adjoint of one may fail."""

    def loss(shift, monitor):
        def one(rate, y0):
            fn = lambda y, shift: rate * y + shift
            return eqlx.fixed_point(
                fn,
                eqlx.FixedPointIteration(1e-6, 1e-6),
                y0,
                shift,
                adjoint=eqlx.ImplicitAdjoint(
                    eqlx.FixedPointLinearSolver(max_steps=200), on_failure=on_failure
                ),
                monitor=monitor,
                throw=throw,
            ).value

        # Both start at a solution.
        return jnp.sum(jax.vmap(one)(jnp.asarray(fn_rates), jnp.zeros(len(fn_rates))))

    shifts = (jnp.zeros(()), eqlx.AdjointMonitor())
    return jax.grad(loss, (0, 1))(*shifts)


def test_the_policy_for_a_sample_whose_adjoint_failed():
    # With a rate of one every y is a solution at no shift, and the system is singular.
    grad, seen = _two([0.5, 1.0], eqlx.OnFailure.zero)
    assert jnp.allclose(grad, 2.0)
    assert (seen.num_solves, seen.num_failed) == (2, 1)
    grad, seen = _two([0.5, 1.0], eqlx.OnFailure.nan)
    assert jnp.isnan(grad)
    assert seen.num_failed == 1
    grad, _ = _two([0.5, 1.0], eqlx.OnFailure.keep)
    assert jnp.isfinite(grad)
    assert not jnp.allclose(grad, 2.0)
    for policy in eqlx.OnFailure:
        assert jnp.allclose(_two([0.5, 0.75], policy)[0], 6.0)
        with pytest.raises(Exception, match="linear solve of a derivative failed"):
            jax.block_until_ready(_two([0.5, 1.0], policy, throw=True))


def test_a_solve_that_is_cut_short_may_be_kept(getkey):
    w, x, z, cotangent, _ = _case(getkey)
    short = eqlx.FixedPointLinearSolver(
        eqlx.FixedPointIteration(0.0, 1e-12), max_steps=4
    )
    grad = lambda policy: jax.grad(
        lambda x: _loss(
            _solve(w, x, None, eqlx.ImplicitAdjoint(short, on_failure=policy)),
            cotangent,
        )
    )(x)
    jacobian = np.diag(1 - np.asarray(z) ** 2) @ np.asarray(w)
    powers = [np.linalg.matrix_power(jacobian.T, k) @ cotangent for k in range(5)]
    expected = (1 - np.asarray(z) ** 2) * np.sum(powers, axis=0)
    assert relative_error(grad(eqlx.OnFailure.keep), expected) < 1e-10
    assert jnp.all(grad(eqlx.OnFailure.zero) == 0)
    assert jnp.all(jnp.isnan(grad(eqlx.OnFailure.nan)))


def test_a_layer_hands_out_its_backward_pass(getkey):
    cell = eqlx.nn.AffineCell(_SIZE, _SIZE, key=getkey())
    layer = eqlx.nn.FixedPointLayer(cell, eqlx.Anderson(0.0, 1e-10))
    x = jr.normal(getkey(), (_SIZE,))
    loss = lambda layer, monitor: jnp.sum(layer(x, monitor=monitor))
    grads, seen = jax.jit(
        lambda m: eqx.filter_grad(lambda both: loss(*both))((layer, m))
    )(eqlx.AdjointMonitor())
    assert seen.num_solves == 1
    assert seen.num_steps > 0
    z = layer(x)
    sol = layer.solve_adjoint(x, z, jnp.ones(_SIZE))
    jacobian = jax.jacfwd(lambda z: cell(z, x))(z)
    expected = np.linalg.solve(np.eye(_SIZE) - np.asarray(jacobian).T, np.ones(_SIZE))
    assert relative_error(sol.value, expected) < 1e-8
    assert int(sol.stats["num_steps"]) == int(seen.num_steps)
    assert jnp.any(jax.tree.leaves(grads)[0] != 0)


def test_a_complex_solution_is_a_start_too():
    a = jnp.array([0.1 + 0.2j, 0.3 - 0.1j, 0.2j])
    fn = lambda y, a: (0.48 + 0.3j) * jnp.tanh(y[::-1]) + a
    solver = eqlx.Anderson(1e-8, 1e-8)

    def loss(a, monitor):
        sol = eqlx.fixed_point(fn, solver, 0 * a, a, monitor=monitor)
        return jnp.sum(jnp.real(sol.value))

    _, cold = jax.grad(loss, (0, 1))(a, eqlx.AdjointMonitor(solution=0 * a))
    _, warm = jax.grad(loss, (0, 1))(a, cold)
    assert cold.num_steps > 5
    assert warm.num_steps <= 1
    # Of a batch of `fn` itself, along another axis than the first.
    batch = lambda x: jnp.stack([x, 2 * x], axis=1)

    def of_batch(monitor):
        sol = eqlx.fixed_point(
            fn, solver, batch(0 * a), batch(a), batch_axis=1, monitor=monitor
        )
        return jnp.sum(jnp.real(sol.value))

    cold = jax.grad(of_batch)(eqlx.AdjointMonitor(solution=batch(0 * a)))
    assert jax.grad(of_batch)(cold).num_steps <= 2 < cold.num_steps


def test_a_start_that_the_devices_share():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    w, xs = 0.3 * jnp.eye(3), jnp.ones((2, 3))
    fn = lambda y, args: jnp.tanh(args[0] @ y + args[1])
    solver = eqlx.Anderson(1e-9, 1e-9)

    def local(w, monitor, xs):
        start, args = jnp.zeros(3), (w, xs[0])
        sol = eqlx.fixed_point(fn, solver, start, args, throw=False, monitor=monitor)
        return jax.lax.psum(jnp.sum(sol.value), "d")

    run = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("d")), out_specs=P())
    z = newton(fn, jnp.zeros(3), (w, xs[0]))
    u = 1 / (1 - 0.3 * (1 - z**2))
    g_w, _ = jax.jit(jax.grad(run, (0, 1)))(w, eqlx.AdjointMonitor(solution=u), xs)
    assert relative_error(g_w, 2 * jnp.outer((1 - z**2) * u, z)) < 1e-8

    def guessed(xs, guess):
        y, args = z + 0 * xs[0], (w, xs[0])
        sol = eqlx.solve_adjoint(
            fn, solver, y, jnp.ones(3), args, guess=guess, throw=False
        )
        return sol.value[None]

    run = jax.shard_map(guessed, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    assert relative_error(jax.jit(run)(xs, u), jnp.stack([u, u])) < 1e-8


def test_a_solution_next_to_zero_has_a_derivative_as_good_as_any(getkey):
    a = jr.normal(getkey(), (20, 20))
    a = 0.9 * a / jnp.linalg.norm(a, 2)
    fn, solver = lambda y, b: a @ jnp.tanh(y) + b, eqlx.Anderson(1e-10, 1e-10)
    solve = lambda b: eqlx.fixed_point(fn, solver, jnp.ones(20), b).value
    grad = jax.jit(jax.grad(lambda b: jnp.sum(solve(b))))
    expected = np.linalg.solve(np.eye(20) - np.asarray(a).T, np.ones(20))
    for size in (0.0, 1e-9):
        assert relative_error(grad(jnp.full(20, size)), expected) < 1e-7


def test_the_coarsest_leaf_says_what_rounding_is(getkey):
    q = jnp.linalg.qr(jr.normal(getkey(), (20, 20)))[0]
    w = ((q * jnp.linspace(0.1, 0.999, 20)[None]) @ q.T).astype(jnp.float32)
    y = (jnp.ones(20, jnp.float32), jnp.zeros(2, jnp.float64))
    fn = lambda y, a: (w @ y[0] + a, 0.3 * y[1])
    sol = eqlx.solve_adjoint(
        fn, eqlx.Anderson(1e-6, 1e-6), y, y, jnp.zeros(20, jnp.float32), throw=False
    )
    exact = np.linalg.solve(np.eye(20) - np.asarray(w, np.float64).T, np.ones(20))
    assert sol.stats["is_usable"]
    assert relative_error(sol.value[0], exact) < 1e-3


@pytest.mark.parametrize("num_terms", [0, 2])
def test_a_truncation_takes_no_product_for_nothing(getkey, num_terms):
    w, x = tanh_problem(getkey(), 16, 0.5)

    def loss(x):
        sol = eqlx.fixed_point(
            lambda y, x: jnp.tanh(w @ y + x),
            eqlx.FixedPointIteration(0.0, 1e-6),
            jnp.zeros(16),
            x,
            adjoint=eqlx.ImplicitAdjoint(eqlx.Neumann(num_terms)),
            throw=False,
        )
        return jnp.sum(sol.value)

    # One product in the forward loop, one in the linearisation, one in the series.
    text = optimised_hlo(jax.grad(loss), x)
    assert 0 < text.count(" dot(") <= 2 + (num_terms > 0)


def test_systems_that_depend_on_each_other_are_solved_together_or_refused(getkey):
    a, w = 0.3 * jr.normal(getkey(), (4, 2)), jnp.array([[1.0], [2.0], [30.0], [0.0]])

    def one(a, adjoint):
        fn = lambda y, a: 0.5 * jnp.tanh(y) + 0.3 * jax.lax.pmean(y, "b") + a
        return eqlx.fixed_point(
            fn,
            eqlx.Anderson(1e-10, 1e-10),
            jnp.zeros(2),
            a,
            adjoint=adjoint,
            batching=eqlx.Vmapped(),
            throw=False,
        ).value

    def loss(a, adjoint):
        return jnp.sum(w * jax.vmap(lambda a: one(a, adjoint), axis_name="b")(a))

    def whole(y, a):
        return 0.5 * jnp.tanh(y) + 0.3 * jnp.mean(y, 0, keepdims=True) + a

    flat = lambda y, a: whole(y.reshape(4, 2), a).reshape(8)
    jacobian = jax.jacfwd(flat)(newton(flat, jnp.zeros(8), a), a)
    ct = np.broadcast_to(w, (4, 2)).reshape(8)
    expected = np.linalg.solve(np.eye(8) - np.asarray(jacobian).T, ct).reshape(4, 2)
    for adjoint in (eqlx.ImplicitAdjoint(), eqlx.ImplicitAdjoint(_PICARD)):
        grad = jax.jit(jax.grad(lambda a, adjoint=adjoint: loss(a, adjoint)))
        assert relative_error(grad(a), expected) < 1e-8
    for linear_solver in (eqlx.KrylovLinearSolver(), lx.LU()):
        with pytest.raises(ValueError, match="for each sample by itself"):
            jax.grad(loss)(a, eqlx.ImplicitAdjoint(linear_solver))

    # `batch_axis` takes samples to be independent. Where they are not it shows.
    def of_batch(a, throw):
        sol = eqlx.fixed_point(
            whole, eqlx.Anderson(1e-10, 1e-10), 0 * a, a, batch_axis=0, throw=throw
        )
        return jnp.sum(w * sol.value)

    assert jnp.any(jnp.isnan(jax.grad(of_batch)(a, False)))
    with pytest.raises(Exception, match="depend on"):
        jax.block_until_ready(jax.grad(of_batch)(a, True))
