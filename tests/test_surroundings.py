"""A solve inside other things: control flow, other layers, other people's rules."""

import functools as ft
import warnings
from collections.abc import Callable

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import relative_error, tanh_cell, tanh_problem


_SOLVER = eqlx.Anderson(0.0, 1e-12)


def _solve(fn, y0, args, **kwargs):
    return eqlx.fixed_point(fn, _SOLVER, y0, args, throw=False, **kwargs).value


def _unrolled(fn, y0, args, num=300):
    step = lambda y, _: (fn(y, args), None)
    return jax.lax.scan(step, y0, None, length=num)[0]


def test_in_cond_in_scan():
    # Reference values of float64 unrolled steps.
    def rnn(a):
        cell = lambda z, p: p[0] * jnp.cos(z) + 0.1 * p[1]
        solve = lambda h: _solve(cell, jnp.zeros(()), (a, h))

        def step(h, t):
            return jax.lax.cond(t > 1.5, solve, lambda h: 0.5 * h, h), None

        return jax.lax.scan(step, jnp.ones(()), jnp.arange(4.0))[0]

    a = jnp.array(0.6)
    assert jnp.allclose(rnn(a), 0.5617620)
    assert jnp.allclose(jax.jit(jax.grad(rnn))(a), 0.6910288)
    assert jnp.allclose(jax.jit(jax.jacfwd(rnn))(a), 0.6910288)
    assert jnp.allclose(jax.jit(jax.hessian(rnn))(a), -0.7934898, atol=1e-6)


def test_in_a_while_loop_in_forward_mode():
    # Newton's inverse of the equilibrium: each pass has a solve and its derivative.
    def outer(a):
        def body(carry):
            k, x = carry
            return k + 1, 0.5 * _solve(lambda y, p: jnp.cos(p * y), 0 * x, a * x + 1)

        return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, jnp.ones(())))[1]

    def unrolled(a):
        x = jnp.ones(())
        for _ in range(3):
            x = 0.5 * _unrolled(lambda y, p: jnp.cos(p * y), 0 * x, a * x + 1, 3000)
        return x

    a = jnp.array(0.1)
    value, tangent = jax.jit(lambda a: jax.jvp(outer, (a,), (jnp.ones(()),)))(a)
    assert jnp.allclose(value, unrolled(a))
    h = 1e-5
    by_difference = (unrolled(a + h) - unrolled(a - h)) / (2 * h)
    assert jnp.allclose(tangent, by_difference, rtol=1e-6)


def test_a_layer_inside_a_layer(getkey):
    # y = tanh(V y + z(y)) with z = tanh(W z + y): one fixed point of both is the truth.
    w, x = tanh_problem(getkey(), 4, 0.5)
    v, _ = tanh_problem(getkey(), 4, 0.3)

    def nested(args):
        w, v, x = args

        def outer(y, args):
            z = _solve(tanh_cell, jnp.zeros(4), (args[0], y))
            return jnp.tanh(args[1] @ y + 0.5 * z + args[2])

        return _solve(outer, jnp.zeros(4), (w, v, x))

    def flat(args):
        w, v, x = args

        def both(state, _):
            y, z = state
            new_y = jnp.tanh(v @ y + 0.5 * z + x)
            return (new_y, jnp.tanh(w @ z + y)), None

        return jax.lax.scan(both, (0 * x, 0 * x), None, length=400)[0][0]

    loss = lambda f: lambda args: jnp.sum(jnp.sin(f(args)))
    args = (w, v, x)
    got = jax.jit(jax.grad(loss(nested)))(args)
    assert relative_error(got, jax.grad(loss(flat))(args)) < 1e-9
    xs = jnp.stack([x, 2 * x])
    batch = jax.vmap(lambda x: jax.grad(loss(nested))((w, v, x))[2])
    expected = jax.grad(loss(flat))((w, v, 2 * x))[2]
    assert relative_error(jax.jit(batch)(xs)[1], expected) < 1e-9


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
def test_rematerialised(getkey, policy):
    cell = eqlx.nn.AffineCell(3, 4, key=getkey())
    layer = eqlx.nn.FixedPointLayer(cell, _SOLVER)
    xs = jr.normal(getkey(), (5, 3))

    def loss(layer, remat):
        run = lambda x: jnp.sum(layer(x) ** 2)
        return jnp.sum(
            jax.vmap(jax.checkpoint(run, policy=policy) if remat else run)(xs)
        )

    plain, again = (
        eqx.filter_jit(eqx.filter_grad(ft.partial(loss, remat=r)))(layer)
        for r in (False, True)
    )

    def unrolled(cell):
        one = lambda x: jnp.sum(_unrolled(cell, jnp.zeros(4), x) ** 2)
        return jnp.sum(jax.vmap(one)(xs))

    expected = eqx.filter_grad(unrolled)(cell)
    for got in (plain, again):
        assert (
            relative_error(
                eqx.filter(got.cell, eqx.is_array), eqx.filter(expected, eqx.is_array)
            )
            < 1e-8
        )


def test_donated_parameters_and_starts():
    # No warning, no deleted buffer, also where the start is the solution already.
    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def step(c, z0):
        fn = lambda z, c: jnp.tanh(0.3 * z + c)
        z, pull = jax.vjp(lambda c: _solve(fn, z0, c), c)
        return c - 0.1 * pull(jnp.ones_like(z))[0], z

    c, expected, root = jnp.full(4, 0.3), np.full(4, 0.3), np.zeros(4)
    z = jnp.zeros(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            c, z = step(c, z)
    for _ in range(3):
        root = np.zeros(4)
        for _ in range(200):
            root = np.tanh(0.3 * root + expected)
        slope = 1 - root**2
        expected = expected - 0.1 * slope / (1 - 0.3 * slope)
    assert np.allclose(c, expected, atol=1e-10)
    assert np.allclose(z, root, atol=1e-10)


def _with_jvp(factor):
    """tanh, with a slope that is wrong by `factor`, so that it shows."""

    @jax.custom_jvp
    def act(x):
        return jnp.tanh(x)

    @act.defjvp
    def _(primals, tangents):
        y = jnp.tanh(primals[0])
        return y, factor * (1 - y * y) * tangents[0]

    return act


def _with_vjp(factor):
    """The same by a rule for reverse mode alone."""

    @jax.custom_vjp
    def act(x):
        return jnp.tanh(x)

    def fwd(x):
        y = act(x)
        return y, y

    act.defvjp(fwd, lambda y, ct: (factor * (1 - y * y) * ct,))
    return act


def _by_the_rule(w, x, ct):
    """The gradient in `w` and `x` with a slope three times too steep."""
    z = np.asarray(_unrolled(tanh_cell, 0 * x, (w, x)))
    slope = 3 * (1 - z**2)
    system = np.eye(z.size) - slope[:, None] * np.asarray(w)
    u = np.linalg.solve(system.T, ct)
    return np.outer(slope * u, z), slope * u


@pytest.mark.parametrize("act", [_with_jvp(3), _with_vjp(3)])
def test_rules_inside_fn_are_respected(getkey, act):
    w, x = tanh_problem(getkey(), 4, 0.25)
    ct = jr.normal(getkey(), (4,))
    cell = lambda z, args: act(args[0] @ z + args[1])
    loss = lambda w, x: jnp.sum(_solve(cell, jnp.zeros(4), (w, x)) * ct)
    expected = _by_the_rule(w, x, np.asarray(ct))
    assert relative_error(jax.jit(jax.grad(loss, (0, 1)))(w, x), expected) < 1e-9
    xs = jnp.stack([x, -2 * x, 3 * x])
    parts = [_by_the_rule(w, x, np.asarray(ct)) for x in xs]
    expected = (sum(p[0] for p in parts), np.stack([p[1] for p in parts]))
    total = lambda w, xs: jnp.sum(jax.vmap(loss, (None, 0))(w, xs))
    assert relative_error(jax.jit(jax.grad(total, (0, 1)))(w, xs), expected) < 1e-9
    each = jax.jit(jax.vmap(jax.grad(loss, 1), (None, 0)))(w, xs)
    assert relative_error(each, expected[1]) < 1e-9


def test_a_rule_for_reverse_mode_alone(getkey):
    w, x = tanh_problem(getkey(), 4, 0.25)
    ct = jr.normal(getkey(), (4,))

    def loss(x, monitor=None, act: Callable = _with_vjp(3)):  # noqa: B008
        cell = lambda z, args: act(args[0] @ z + args[1])
        z = _solve(cell, jnp.zeros(4), (w, x), monitor=monitor)
        return jnp.sum(z * ct)

    # Second order, in reverse mode twice.
    hessian = jax.jit(jax.jacrev(jax.grad(ft.partial(loss, act=_with_vjp(1)))))(x)
    unrolled = lambda x: jnp.sum(_unrolled(tanh_cell, jnp.zeros(4), (w, x)) * ct)
    assert relative_error(hessian, jax.hessian(unrolled)(x)) < 1e-9
    # The monitor.
    monitor = eqlx.AdjointMonitor(solution=jnp.zeros(4))
    grad, seen = jax.grad(loss, (0, 1))(x, monitor)
    assert relative_error(grad, _by_the_rule(w, x, np.asarray(ct))[1]) < 1e-9
    _, of_jvp = jax.grad(ft.partial(loss, act=_with_jvp(3)), (0, 1))(x, monitor)
    assert seen.num_solves == 1
    assert seen.num_steps == of_jvp.num_steps
    assert relative_error(seen.solution, of_jvp.solution) < 1e-9
    # Forward mode has no rule to follow.
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (x,), (x,))


def test_a_rule_for_reverse_mode_alone_in_shard_map(getkey):
    w, x = tanh_problem(getkey(), 4, 0.25)
    ct = jr.normal(getkey(), (4,))
    act = _with_vjp(3)
    cell = lambda z, args: act(args[0] @ z + args[1])
    xs = jnp.linspace(0.5, 2, 8)[:, None] * x[None]

    def local(w, xs, monitor):
        def loss(w, xs, monitor):
            one = lambda x: _solve(cell, jnp.zeros(4), (w, x), monitor=monitor)
            return jnp.sum(jax.vmap(one)(xs) * ct[None])

        return jax.grad(loss, (0, 1, 2))(w, xs, monitor)

    mesh = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("b"), P()), out_specs=(P(), P("b"), P())
    )
    g_w, g_x, seen = jax.jit(run)(w, xs, eqlx.AdjointMonitor())
    parts = [_by_the_rule(w, x, np.asarray(ct)) for x in xs]
    assert relative_error(g_w, sum(p[0] for p in parts)) < 1e-9
    assert relative_error(g_x, np.stack([p[1] for p in parts])) < 1e-9
    assert seen.num_solves == 8


def test_a_failed_adjoint_of_a_rule_for_reverse_mode_alone():
    # With a slope of three times 0.4 the system is singular nowhere, and expands.
    act = _with_vjp(3)
    fn = lambda y, c: act(0.4 * y) + c

    def loss(c, throw):
        adjoint = eqlx.ImplicitAdjoint(
            eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, 1e-9))
        )
        return eqlx.fixed_point(
            fn, _SOLVER, jnp.zeros(()), c, adjoint=adjoint, throw=throw
        ).value

    assert jnp.isnan(jax.grad(loss)(jnp.zeros(()), False))
    with pytest.raises(Exception, match="linear solve of a derivative failed"):
        jax.block_until_ready(jax.grad(loss)(jnp.zeros(()), True))
