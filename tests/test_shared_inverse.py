"""SHINE: the inverse of the forward pass, as solution, start and preconditioner."""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import dense_sensitivity, newton, relative_error, tanh_cell, tanh_problem


_SIZE, _STEPS = 8, 6
_SOLVERS = {
    "broyden": eqlx.Broyden(0.0, 0.0, history_length=20),
    "bad_broyden": eqlx.BadBroyden(0.0, 0.0, history_length=20),
}
solvers = pytest.mark.parametrize("name", list(_SOLVERS))


def _dense_inverse(name, fn, y, num_steps):
    """Broyden's method with a dense estimate of the inverse of `J - I`."""
    y = np.asarray(y)
    inverse = -np.eye(y.size)
    g = np.asarray(fn(y)) - y
    for _ in range(num_steps):
        step = -inverse @ g
        y = y + step
        new_g = np.asarray(fn(y)) - y
        change, g = new_g - g, new_g
        gap = step - inverse @ change
        if name == "broyden":
            row = step @ inverse
            inverse = inverse + np.outer(gap, row) / (row @ change)
        else:
            inverse = inverse + np.outer(gap, change) / (change @ change)
    return y, inverse


def _case(getkey, name, gain=0.7):
    w, x = tanh_problem(getkey(), _SIZE, gain)
    ct = jr.normal(getkey(), (_SIZE,))
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    y, inverse = _dense_inverse(name, fn, np.zeros(_SIZE), _STEPS)
    return w, x, ct, y, inverse


def _solve(w, x, name, adjoint, **kwargs):
    start = jnp.zeros(_SIZE, x.dtype)
    return eqlx.fixed_point(
        tanh_cell,
        _SOLVERS[name],
        start,
        (w, x),
        max_steps=_STEPS,
        adjoint=adjoint,
        throw=False,
        **kwargs,
    ).value


@solvers
@pytest.mark.parametrize("num_terms", [0, 2])
def test_the_gradient_is_that_of_the_estimate(getkey, name, num_terms):
    w, x, ct, y, inverse = _case(getkey, name)
    adjoint = eqlx.SharedInverseAdjoint(eqlx.Neumann(num_terms), max_growth=100.0)
    assert np.allclose(_solve(w, x, name, adjoint), y, atol=1e-12)
    slope = 1 - np.tanh(np.asarray(w) @ y + np.asarray(x)) ** 2
    system = np.eye(_SIZE) - slope[:, None] * np.asarray(w)
    u = -inverse.T @ np.asarray(ct)
    for _ in range(num_terms):
        u = u - inverse.T @ (np.asarray(ct) - system.T @ u)
    loss = lambda x: jnp.sum(_solve(w, x, name, adjoint) * ct)
    assert relative_error(jax.grad(loss)(x), slope * u) < 1e-9
    # Forward mode takes the estimate, reverse mode its transpose.
    t = jnp.cos(x)
    forward = jax.jvp(lambda x: _solve(w, x, name, adjoint), (x,), (t,))[1]
    right = slope * np.asarray(t)
    v = -inverse @ right
    for _ in range(num_terms):
        v = v - inverse @ (right - system @ v)
    assert relative_error(forward, v) < 1e-9


@solvers
def test_an_estimate_that_explodes_is_replaced_by_one_step(getkey, name):
    w, x, ct, y, inverse = _case(getkey, name)
    growth = np.linalg.norm(inverse.T @ np.asarray(ct)) / np.linalg.norm(ct)
    slope = 1 - np.tanh(np.asarray(w) @ y + np.asarray(x)) ** 2

    def grad(max_growth):
        adjoint = eqlx.SharedInverseAdjoint(max_growth=max_growth)
        return jax.grad(lambda x: jnp.sum(_solve(w, x, name, adjoint) * ct))(x)

    trusted, fallen_back = -slope * (inverse.T @ np.asarray(ct)), slope * np.asarray(ct)
    assert relative_error(grad(1.001 * growth), trusted) < 1e-9
    assert relative_error(grad(0.999 * growth), fallen_back) < 1e-9
    default = grad(None)
    assert relative_error(default, trusted if growth <= 1.8 else fallen_back) < 1e-9
    # Each sample for itself.
    cts = jnp.stack([ct, jnp.asarray(np.linalg.solve(inverse.T, np.ones(_SIZE)))])
    growths = np.linalg.norm(cts @ inverse, axis=1) / np.linalg.norm(cts, axis=1)
    limit = np.sqrt(growths[0] * growths[1])
    adjoint = eqlx.SharedInverseAdjoint(max_growth=float(limit))
    _, pull = jax.vjp(lambda x: _solve(w, x, name, adjoint), x)
    got = jax.vmap(lambda ct: pull(ct)[0])(cts)
    for k in range(2):
        u = -cts[k] @ inverse if growths[k] < limit else cts[k]
        assert relative_error(got[k], slope * u) < 1e-9


@pytest.mark.parametrize(
    ("name", "linear_solver"),
    [
        ("broyden", eqlx.KrylovLinearSolver(1e-12)),
        ("bad_broyden", eqlx.FixedPointLinearSolver(eqlx.Anderson(0.0, 1e-12))),
    ],
)
def test_as_a_preconditioner_it_is_exact(getkey, name, linear_solver):
    w, x = tanh_problem(getkey(), _SIZE, 0.9)
    solver = eqx.tree_at(lambda s: s.atol, _SOLVERS[name], 1e-12)
    adjoint = eqlx.SharedInverseAdjoint(linear_solver)
    solve = lambda args: (
        eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(_SIZE), args, adjoint=adjoint
        ).value
    )
    z = newton(tanh_cell, jnp.zeros(_SIZE), (w, x))
    dense = dense_sensitivity(tanh_cell, z, (w, x))
    assert relative_error(jax.jit(jax.jacrev(solve))((w, x)), dense) < 1e-9
    assert relative_error(jax.jit(jax.jacfwd(solve))((w, x)), dense) < 1e-9


def test_as_a_preconditioner_it_saves_products(getkey):
    # Few directions contract slowly, and these the forward solve has learnt.
    rates = jnp.concatenate([jnp.array([0.99, 0.97, 0.95, -0.9]), jnp.zeros(28)])
    q = jnp.linalg.qr(jr.normal(getkey(), (32, 32)))[0]
    a = (q * rates[None]) @ q.T
    b, ct = jr.normal(getkey(), (32,)), jr.normal(getkey(), (32,))

    def steps(adjoint, solver):
        def loss(b, monitor):
            fn = lambda y, b: a @ y + b
            sol = eqlx.fixed_point(
                fn, solver, 0 * b, b, adjoint=adjoint, monitor=monitor
            )
            return jnp.sum(sol.value * ct)

        grad, seen = jax.grad(loss, (0, 1))(b, eqlx.AdjointMonitor())
        expected = np.linalg.solve(np.eye(32) - np.asarray(a).T, ct)
        assert relative_error(grad, expected) < 1e-6
        return float(seen.num_steps)

    solver = eqlx.Broyden(0.0, 1e-8, history_length=20)
    picard = eqlx.FixedPointLinearSolver(
        eqlx.FixedPointIteration(0.0, 1e-8), max_steps=5000
    )
    shared = steps(eqlx.SharedInverseAdjoint(picard), solver)
    assert shared < 0.1 * steps(eqlx.ImplicitAdjoint(picard), solver)


def test_in_batches_shard_map_and_half_precision(getkey):
    w, x, ct, y, inverse = _case(getkey, "broyden")
    adjoint = eqlx.SharedInverseAdjoint(max_growth=100.0)
    slope = 1 - np.tanh(np.asarray(w) @ y + np.asarray(x)) ** 2
    expected = -slope * (inverse.T @ np.asarray(ct))
    loss = lambda x: jnp.sum(_solve(w, x, "broyden", adjoint) * ct)
    xs = jnp.stack([x] * 8)
    mesh = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Explicit,))
    run = jax.shard_map(
        jax.vmap(jax.grad(loss)), mesh=mesh, in_specs=(P("b"),), out_specs=P("b")
    )
    xs = jax.device_put(xs, jax.NamedSharding(mesh, P("b")))
    assert relative_error(np.asarray(jax.jit(run)(xs))[5], expected) < 1e-9

    def of_batch(xs):
        fn = lambda zs, xs: jnp.tanh(zs @ w.T + xs)
        sol = eqlx.fixed_point(
            fn,
            _SOLVERS["broyden"],
            jnp.zeros((2, _SIZE)),
            xs,
            max_steps=_STEPS,
            adjoint=adjoint,
            batch_axis=0,
        )
        return jnp.sum(sol.value * ct[None])

    got = jax.grad(of_batch)(jnp.stack([x, x]))
    assert relative_error(got[1], expected) < 1e-9
    half = jax.grad(
        lambda x: jnp.sum(
            _solve(w.astype(x.dtype), x, "broyden", adjoint).astype(jnp.float32)
            * ct.astype(jnp.float32)
        )
    )(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # Six steps of Broyden's in bfloat16 are not those of float64.
    half = np.asarray(half, np.float64)
    cosine = half @ expected / np.linalg.norm(half) / np.linalg.norm(expected)
    assert cosine > 0.9


def test_the_solve_that_is_spoken_of_has_the_state(getkey):
    w, x, ct, y, inverse = _case(getkey, "broyden")
    solver = _SOLVERS["broyden"]
    sol = eqlx.fixed_point(
        tanh_cell, solver, jnp.zeros(_SIZE), (w, x), max_steps=_STEPS
    )
    adjoint = eqlx.SharedInverseAdjoint(max_growth=100.0)
    u = eqlx.solve_adjoint(
        tanh_cell, solver, sol.value, ct, (w, x), adjoint=adjoint, state=sol.state
    )
    assert relative_error(u.value, -inverse.T @ np.asarray(ct)) < 1e-9
    assert u.stats["num_steps"] == 0
