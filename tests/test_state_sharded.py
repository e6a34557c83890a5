"""Solves of one `y` that is split over devices: the same steps as of a whole one."""

import functools as ft

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import (
    dense_sensitivity,
    every_solver,
    newton,
    relative_error,
    tanh_cell,
    tanh_problem,
)
from .hlo import Program, program


_SIZE = 32
_ROWS, _PART = P("m", None), P("m")


def _mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("m",), axis_types=(axis_type,))


def _cell(z, args):
    """`tanh(w z + x)` with the rows of `w`, and parts of `z` and of `x`."""
    w, x = args
    return jnp.tanh(w @ jax.lax.all_gather(z, "m", tiled=True) + x)


_IMPLICIT = eqlx.ImplicitAdjoint()


def _split_solve(solver, mesh, *, check_vma=True, fn=_cell, adjoint=_IMPLICIT):
    """`solution, steps, result` of a solve that is split along `m`."""

    def local(w, x):
        start, args = jnp.zeros_like(x), (w, x)
        sol = eqlx.fixed_point(fn, solver, start, args, adjoint=adjoint, throw=False)
        num_steps = sol.stats["num_steps"][None]
        is_good = (sol.result == eqlx.RESULTS.successful)[None]
        return sol.value, num_steps, is_good, sol.stats["residual"][None]

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_ROWS, _PART),
        out_specs=(_PART,) * 4,
        check_vma=check_vma,
    )


def _place(mesh, w, x):
    put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
    return put(w, _ROWS), put(x, _PART)


def _split_solvers(tol):
    """All that have an `axis_name`, which is all but Newton's method."""
    solvers = every_solver(0.0, tol)
    del solvers["newton"]
    more = {
        "aitken": eqlx.Aitken(0.0, tol),
        "squarem": eqlx.Squarem(0.0, tol),
        "search": eqlx.Broyden(0.0, tol, line_search=eqlx.Backtracking()),
    }
    return {k: s.split_along("m") for k, s in (solvers | more).items()}


@ft.cache
def _problem(gain=0.9):
    """A problem, its solution, and the derivatives of that."""
    w, x = tanh_problem(jr.key(5), _SIZE, gain)
    z = newton(tanh_cell, jnp.zeros(_SIZE), (w, x))
    return (w, x), z, dense_sensitivity(tanh_cell, z, (w, x))


@pytest.mark.parametrize("name", list(_split_solvers(0.0)))
def test_each_solver_ends_on_all_devices_at_once(name):
    (w, x), exact, _ = _problem()
    solver = _split_solvers(1e-9)[name]
    z, steps, is_good, residual = jax.jit(_split_solve(solver, _mesh()))(w, x)
    assert relative_error(z, exact) < 1e-7
    assert np.all(is_good)
    # The maximum of all devices, on every one of them.
    true = np.max(np.abs(np.tanh(w @ z + x) - z))
    assert np.allclose(residual, true, rtol=1e-3, atol=1e-15)
    assert len(set(steps.tolist())) == 1
    if name not in ("anderson", "newton_krylov", "broyden"):
        return
    whole = eqlx.fixed_point(
        tanh_cell, solver.split_along(None), jnp.zeros(_SIZE), (w, x)
    )
    assert int(steps[0]) == int(whole.stats["num_steps"])
    assert np.max(np.abs(z - whole.value)) < 1e-6


_KINDS = [
    (AxisType.Auto, True),
    (AxisType.Explicit, True),
    (AxisType.Auto, False),
]
_ADJOINTS = {
    "default": _IMPLICIT,
    "krylov": eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver(1e-11)),
    "fixed_point": eqlx.ImplicitAdjoint(
        eqlx.FixedPointLinearSolver(eqlx.Broyden(0.0, 1e-11))
    ),
    "shared_inverse": eqlx.SharedInverseAdjoint(eqlx.KrylovLinearSolver(1e-11)),
    "reversible": eqlx.ReversibleAdjoint(),
}


def _solver_for(adjoint):
    if adjoint == "shared_inverse":
        return eqlx.Broyden(0.0, 1e-11, axis_name="m")
    if adjoint == "reversible":
        return eqlx.Reversible(0.0, 1e-11, beta=0.6, axis_name="m")
    return eqlx.Anderson(0.0, 1e-11, axis_name="m")


@pytest.mark.parametrize(
    ("adjoint", "kind"),
    [("default", kind) for kind in _KINDS] + [(a, _KINDS[1]) for a in _ADJOINTS][1:],
)
def test_gradients(getkey, adjoint, kind):
    (w, x), _, exact = _problem(0.5 if adjoint == "reversible" else 0.9)
    weights = jr.normal(getkey(), (_SIZE,))
    axis_type, check_vma = kind
    mesh = _mesh(axis_type)

    def loss(w, x, weights):
        solve = _split_solve(
            _solver_for(adjoint),
            mesh,
            check_vma=check_vma,
            adjoint=_ADJOINTS[adjoint],
        )
        return jnp.sum(weights * solve(w, x)[0])

    weights = jax.device_put(weights, jax.NamedSharding(mesh, _PART))
    got = jax.jit(jax.grad(loss, (0, 1)))(*_place(mesh, w, x), weights)
    for g, d in zip(got, exact, strict=True):
        expected = np.tensordot(np.asarray(weights), np.asarray(d), 1)
        assert relative_error(g, expected) < 1e-7


def test_a_derivative_where_the_iteration_does_not_contract(getkey):
    # The adjoint goes over to GMRES, on all devices alike.
    q, _ = jnp.linalg.qr(jr.normal(getkey(), (_SIZE, _SIZE)))
    w = 3 * q @ jnp.diag(jnp.linspace(-1, 0.2, _SIZE)) @ q.T
    x = jr.normal(getkey(), (_SIZE,))

    def linear(z, args):
        w, x = args
        return w @ jax.lax.all_gather(z, "m", tiled=True) + x

    def loss(w, x):
        solver = eqlx.NewtonKrylov(0.0, 1e-9, axis_name="m")
        return jnp.sum(_split_solve(solver, _mesh(), fn=linear)(w, x)[0])

    got = jax.jit(jax.grad(loss, 1))(w, x)
    expected = np.linalg.solve(np.eye(_SIZE) - np.asarray(w).T, np.ones(_SIZE))
    assert relative_error(got, expected) < 1e-7


def _of_solve(solver) -> Program:
    (w, x), _, _ = _problem()
    return program(_split_solve(solver, _mesh()), w, x)


# That of an extrapolation is in a branch.
@pytest.mark.parametrize(
    ("name", "num"), [("picard", 1), ("alternating", 2), ("anderson", 2)]
)
def test_the_all_reduces_of_a_step(name, num):
    compiled = _of_solve(_split_solvers(1e-9)[name])
    (body,) = compiled.loops()
    found = compiled.collectives(body, with_inner_loops=False)
    assert sorted(found) == ["all-gather"] + ["all-reduce"] * num


def test_the_all_reduces_of_a_step_of_gmres():
    compiled = _of_solve(eqlx.NewtonKrylov(0.0, 1e-9, axis_name="m"))
    counts = [
        sorted(compiled.collectives(name, with_inner_loops=False))
        for name in compiled.loops()
    ]
    # The product, two projections onto the basis and the length of what is left.
    assert ["all-gather"] + ["all-reduce"] * 3 in counts
    assert max(c.count("all-reduce") for c in counts) <= 5


def test_a_batch_over_one_axis_and_the_state_over_the_other(getkey):
    w, _ = tanh_problem(getkey(), _SIZE, 0.8)
    xs = jnp.linspace(0.1, 2, 4)[:, None] * jr.normal(getkey(), (4, _SIZE))
    mesh = jax.make_mesh((4, 2), ("b", "m"), axis_types=(AxisType.Explicit,) * 2)

    def local(w, xs):
        solver = eqlx.Anderson(0.0, 1e-10, axis_name="m")

        def one(x):
            start = jnp.zeros_like(x)
            sol = eqlx.fixed_point(_cell, solver, start, (w, x), throw=False)
            return sol.value, sol.stats["num_steps"]

        z, steps = jax.vmap(one)(xs)
        total = jax.lax.psum(jnp.sum(z), ("b", "m"))
        return total, (z, steps)

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("m", None), P("b", "m")),
        out_specs=(P(), (P("b", "m"), P("b"))),
    )
    put = lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec))
    args = put(w, P("m", None)), put(xs, P("b", "m"))
    out = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(*args)
    (_, (z, steps)), grads = jax.tree.map(np.asarray, out)
    grad_w = 0
    for k, x in enumerate(xs):
        exact = newton(tanh_cell, jnp.zeros(_SIZE), (w, x))
        d_w, d_x = dense_sensitivity(tanh_cell, exact, (w, x))
        assert relative_error(z[k], exact) < 1e-8
        assert relative_error(grads[1][k], d_x.sum(0)) < 1e-7
        grad_w = grad_w + d_w.sum(0)
    assert relative_error(grads[0], grad_w) < 1e-7
    # Each batch of a row of devices took the steps of its own samples.
    assert len(set(steps.tolist())) > 2


@pytest.mark.parametrize("check_vma", [True, False])
def test_what_is_not_a_number_on_one_device_ends_the_solve_on_all(check_vma):
    def fn(z, args):
        del args
        shared = jax.lax.pmean(z, "m")
        # Two steps in, on the last device alone.
        is_last = (jax.lax.axis_index("m") == 7) & jnp.all(shared > 1.2)
        return jnp.where(is_last, jnp.nan, 0.5 * shared + 1)

    def local(z):
        solver = eqlx.FixedPointIteration(0.0, 1e-9, axis_name="m")
        sol = eqlx.fixed_point(fn, solver, z, throw=False)
        lost = sol.result == eqlx.RESULTS.nonfinite
        return sol.value, lost[None], sol.stats["num_steps"][None]

    run = jax.shard_map(
        local, mesh=_mesh(), in_specs=_PART, out_specs=_PART, check_vma=check_vma
    )
    value, lost, steps = jax.jit(run)(jnp.zeros(8))
    assert np.all(lost)
    assert set(steps.tolist()) == {2}
    assert np.allclose(value, 1.5)


@pytest.mark.parametrize(
    ("norm", "check_vma"),
    [
        (eqlx.max_norm, True),
        (eqlx.rms_norm, True),
        (eqlx.two_norm, False),
    ],
)
def test_norms_of_parts_are_those_of_the_whole(getkey, norm, check_vma):
    a, b = jr.normal(getkey(), (16, 3)), jnp.full(8, 1e30, jnp.complex64)

    @jax.jit
    @jax.value_and_grad
    def of_parts(a, b):
        return jax.shard_map(
            lambda a, b: norm({"a": a, "b": b}, "m"),
            mesh=_mesh(),
            in_specs=_PART,
            out_specs=P(),
            check_vma=check_vma,
        )(a, b)

    def of_whole(*leaves):
        flat = np.concatenate([np.ravel(np.asarray(x)) for x in leaves]).astype(complex)
        size = np.linalg.norm(flat, ord=np.inf if norm is eqlx.max_norm else 2)
        return size / np.sqrt(flat.size) if norm is eqlx.rms_norm else size

    assert np.allclose(of_parts(a, b)[0], of_whole(a, b), rtol=1e-6)
    value, slope = of_parts(a, 0 * b)
    assert np.allclose(value, of_whole(a, 0 * b), rtol=1e-12)
    step = 1e-6 * np.cos(np.arange(48)).reshape(16, 3)
    change = (of_whole(a + step, 0 * b) - of_whole(a - step, 0 * b)) / 2
    assert np.allclose(np.sum(slope * step), change, rtol=1e-6)
    assert np.isnan(of_parts(a.at[11, 2].set(jnp.nan), b)[0])


def test_a_norm_of_a_users_own():
    (w, x), exact, _ = _problem()

    def one_norm(y, axis_name):
        return jax.lax.psum(jnp.sum(jnp.abs(y)), axis_name)

    solver = eqlx.Anderson(0.0, 1e-9, one_norm, axis_name="m")
    z, _, is_good, residual = jax.jit(_split_solve(solver, _mesh()))(w, x)
    assert np.all(is_good)
    assert relative_error(z, exact) < 1e-7
    true = np.sum(np.abs(np.tanh(w @ z + x) - z))
    assert np.allclose(residual, true, rtol=1e-3)


def test_errors_say_what_to_do():
    (w, x), _, _ = _problem()
    with pytest.raises(ValueError, match=r"`norm` must be callable.*axis_name='m'"):
        eqlx.Anderson(0.0, 1e-9, lambda y: jnp.max(jnp.abs(y)), axis_name="m")
    solver = eqlx.Anderson(0.0, 1e-9, axis_name="m")
    with pytest.raises(ValueError, match=r"`axis_name` must name axes.*\['m'\]"):
        eqlx.fixed_point(tanh_cell, solver, jnp.zeros(_SIZE), (w, x))
    with pytest.raises(ValueError, match="`solver=Newton` needs the whole of `y`"):
        eqlx.Newton(0.0, 1e-9).split_along("m")
    whole = lambda w, x: (
        eqlx.fixed_point(tanh_cell, solver, jnp.zeros(_SIZE), (w, x), throw=False).value
    )
    run = jax.shard_map(whole, mesh=_mesh(), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="the same on all devices"):
        run(w, x)
    plain = _split_solve(eqlx.Anderson(0.0, 1e-9), _mesh())
    with pytest.raises(ValueError, match="give the solver `axis_name='m'`"):
        plain(w, x)
    direct = _split_solve(solver, _mesh(), adjoint=eqlx.ImplicitAdjoint(lx.LU()))
    with pytest.raises(ValueError, match="`linear_solver=LU`"):
        jax.grad(lambda w: jnp.sum(direct(w, x)[0]))(w)
