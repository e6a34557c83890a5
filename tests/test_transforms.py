"""Every public function under every transformation, on every platform's lowering."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from equilax._batching import while_loop
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import (
    batch_reference,
    each_with_one,
    every_solver,
    optimised_hlo,
    relative_error,
    tanh_cell,
    tanh_problem,
)
from .hlo import program


_size, _num = 6, 16
_adjoints = {
    "implicit": eqlx.ImplicitAdjoint(),
    "neumann": eqlx.ImplicitAdjoint(eqlx.Neumann(60)),
}
adjoints = pytest.mark.parametrize("adjoint", _adjoints.values(), ids=list(_adjoints))
meshes = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def _batch(getkey, dtype=jnp.float64):
    w, _ = tanh_problem(getkey(), _size, 0.7, dtype)
    scale = jnp.linspace(0.01, 2, _num, dtype=dtype)[:, None]
    return w, scale * jr.normal(getkey(), (_num, _size), dtype)


def _solve(w, x, *, name="anderson", adjoint=_adjoints["implicit"], **kwargs):
    tol = 1e-11 if x.dtype == jnp.float64 else 1e-6
    return eqlx.fixed_point(
        tanh_cell,
        every_solver(0.0, tol)[name],
        jnp.zeros(_size, x.dtype),
        (w, x),
        adjoint=adjoint,
        throw=False,
        **kwargs,
    )


def _mesh(axis_type, num=8):
    return jax.make_mesh((num,), ("b",), axis_types=(axis_type,))


def _sharded(mesh, fn, in_specs, out_specs, check_vma=True):
    return jax.jit(
        jax.shard_map(
            fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )
    )


def _put(mesh, w, xs):
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    return place(w, P()), place(xs, P("b"))


@pytest.mark.parametrize(
    ("name", "kind"),
    each_with_one(
        every_solver(0.0, 0.0),
        [(t, c) for c in (True, False) for t in (AxisType.Auto, AxisType.Explicit)],
    ),
)
def test_values_and_steps_in_shard_map(getkey, name, kind):
    axis_type, check_vma = kind
    w, xs = _batch(getkey)
    mesh = _mesh(axis_type)

    def shard(w, xs):
        sol = jax.vmap(lambda x: _solve(w, x, name=name))(xs)
        return sol.value, sol.stats["num_steps"], sol.stats["residual"]

    run = _sharded(mesh, shard, (P(), P("b")), P("b"), check_vma)
    value, steps, residual = run(*_put(mesh, w, xs))
    expected, _, _ = batch_reference(w, xs)
    assert np.max(np.abs(value - expected)) < 1e-9
    # A counter that kept the type of a replicated one would be the first device's.
    true = np.max(np.abs(np.tanh(value @ w.T + xs) - value), axis=1)
    assert np.allclose(residual, true, atol=1e-15)
    assert len(set(steps.tolist())) > (1 if "newton" in name else 2)


@meshes
@adjoints
def test_gradients_in_and_through_shard_map(getkey, axis_type, adjoint):
    w, xs = _batch(getkey)
    mesh = _mesh(axis_type)
    _, grad_w, grad_x = batch_reference(w, xs)

    def local(w, xs):
        return jnp.sum(jax.vmap(lambda x: _solve(w, x, adjoint=adjoint).value)(xs))

    # Inside: JAX sums the gradient of what is replicated.
    inside = _sharded(mesh, jax.grad(local, (0, 1)), (P(), P("b")), (P(), P("b")))
    # Outside.
    total = _sharded(
        mesh, lambda w, xs: jax.lax.psum(local(w, xs), "b"), (P(), P("b")), P()
    )
    for grad in (inside, jax.jit(jax.grad(total, (0, 1)))):
        got_w, got_x = grad(*_put(mesh, w, xs))
        assert relative_error(got_w, grad_w) < 1e-8
        assert relative_error(got_x, grad_x) < 1e-8


_others = {
    "krylov": (eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver(1e-10)), "anderson"),
    "shared_inverse": (
        eqlx.SharedInverseAdjoint(eqlx.KrylovLinearSolver(1e-10)),
        "broyden",
    ),
    "reversible": (eqlx.ReversibleAdjoint(), "reversible"),
    "checkpoint": (eqlx.RecursiveCheckpointAdjoint(), "anderson"),
    "default": (eqlx.ImplicitAdjoint(), "newton_krylov"),
}


@pytest.mark.parametrize("name", list(_others))
def test_gradients_without_the_check_of_what_varies(getkey, name):
    # Nothing is known of what is the same on all devices: sums are the user's to take.
    adjoint, solver = _others[name]
    w, xs = _batch(getkey)
    w = 0.5 * w if name == "reversible" else w
    _, grad_w, grad_x = batch_reference(w, xs)

    def local(w, xs):
        def loss(w, xs):
            one = lambda x: _solve(w, x, name=solver, adjoint=adjoint, max_steps=80)
            return jnp.sum(jax.vmap(lambda x: one(x).value)(xs))

        got_w, got_x = jax.grad(loss, (0, 1))(w, xs)
        return jax.lax.psum(got_w, "b"), got_x

    mesh = _mesh(AxisType.Explicit)
    run = _sharded(mesh, local, (P(), P("b")), (P(), P("b")), check_vma=False)
    got_w, got_x = run(*_put(mesh, w, xs))
    assert relative_error(got_w, grad_w) < 1e-7
    assert relative_error(got_x, grad_x) < 1e-7


def test_second_order_in_shard_map():
    mesh = _mesh(AxisType.Explicit)

    def one(a):
        solver = eqlx.FixedPointIteration(0.0, 1e-12)
        fn = lambda y, a: a * y + 1
        return eqlx.fixed_point(fn, solver, jnp.zeros(()), a, throw=False).value

    rates = jnp.linspace(0.1, 0.8, 8)
    run = _sharded(mesh, jax.vmap(jax.grad(jax.grad(one))), P("b"), P("b"))
    got = run(jax.device_put(rates, jax.NamedSharding(mesh, P("b"))))
    assert np.allclose(got, 2 / (1 - rates) ** 3, rtol=1e-6)


@adjoints
def test_a_tangent_of_what_is_replicated(adjoint):
    # The Jacobian differs between devices, the right-hand side does not.
    def local(rates, shift):
        def one(a):
            fn = lambda y, p: p[0] * y + p[1]
            solver = eqlx.Anderson(0.0, 1e-12)
            return eqlx.fixed_point(
                fn, solver, jnp.zeros(()), (a, shift), adjoint=adjoint, throw=False
            ).value

        return jax.vmap(one)(rates)

    mesh, rates = _mesh(AxisType.Explicit), jnp.linspace(0.1, 0.6, 16)
    forward = lambda a, b: jax.jvp(lambda b: local(a, b), (b,), (jnp.ones(()),))[1]
    run = _sharded(mesh, forward, (P("b"), P()), P("b"))
    got = run(jax.device_put(rates, jax.NamedSharding(mesh, P("b"))), jnp.ones(()))
    assert np.allclose(got, 1 / (1 - rates), rtol=1e-9)
    backward = jax.grad(lambda b, a: jnp.sum(local(a, b)))
    run = _sharded(mesh, backward, (P(), P("b")), P())
    got = run(jnp.ones(()), jax.device_put(rates, jax.NamedSharding(mesh, P("b"))))
    assert np.allclose(got, np.sum(1 / (1 - rates)), rtol=1e-9)


def test_a_single_solve_per_device(getkey):
    w, xs = _batch(getkey)
    xs = xs[:8]
    run = _sharded(
        _mesh(AxisType.Explicit),
        lambda w, x: _solve(w, x[0]).value[None],
        (P(), P("b")),
        P("b"),
    )
    value = run(*_put(_mesh(AxisType.Explicit), w, xs))
    assert np.max(np.abs(value - batch_reference(w, xs)[0])) < 1e-9


def test_no_collective_stands_inside_a_loop(getkey):
    w, xs = _batch(getkey)
    mesh = _mesh(AxisType.Explicit)

    def local(w, xs):
        return jnp.sum(jax.vmap(lambda x: _solve(w, x).value)(xs))

    run = _sharded(mesh, jax.grad(local, (0, 1)), (P(), P("b")), (P(), P("b")))
    compiled = program(run, *_put(mesh, w, xs))
    assert len(compiled.loops()) >= 2
    assert compiled.in_loops() == []
    # The search does find the one outside, which sums the gradient of `w`.
    assert compiled.all() == ["all-reduce"]


def test_a_counter_varies_where_the_predicate_does():
    # JAX lets a counter that differs between devices pass for a replicated one.
    def local(x):
        def body(carry):
            return carry[0] + 1, 0.5 * carry[1]

        count, _ = while_loop(
            lambda carry: carry[1][0] > 1, body, (0, x), may_vary=frozenset("b")
        )
        return count[None]

    mesh = _mesh(AxisType.Explicit)
    xs = jnp.exp2(jnp.arange(8.0))
    xs = jax.device_put(xs, jax.NamedSharding(mesh, P("b")))
    counts = _sharded(mesh, local, P("b"), P("b"))(xs)
    assert counts.tolist() == list(range(8))
    with pytest.raises(ValueError, match="replicated"):
        _sharded(mesh, local, P("b"), P())(xs)


def test_throwing_in_shard_map_is_an_error_that_says_what_to_do(getkey):
    w, xs = _batch(getkey)
    mesh = _mesh(AxisType.Explicit)

    def local(w, xs):
        solver = eqlx.Anderson(0.0, 1e-10)
        one = lambda x: eqlx.fixed_point(tanh_cell, solver, 0 * x, (w, x)).value
        return jax.vmap(one)(xs)

    with pytest.raises(ValueError, match="`throw=True`.*`throw=False`"):
        _sharded(mesh, local, (P(), P("b")), P("b"))(*_put(mesh, w, xs))


def test_what_does_not_run_in_shard_map_says_what_does(getkey):
    w, xs = _batch(getkey)
    mesh, adjoint = _mesh(AxisType.Explicit), eqlx.ImplicitAdjoint(lx.LU())

    def local(w, xs):
        return jnp.sum(jax.vmap(lambda x: _solve(w, x, adjoint=adjoint).value)(xs))

    match = "`linear_solver=LU`.*equilax.FixedPointLinearSolver"
    with pytest.raises(ValueError, match=match):
        _sharded(mesh, jax.grad(local), (P(), P("b")), P())(*_put(mesh, w, xs))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("num_steps", [1, 11])
def test_backpropagation_through_the_steps_in_shard_map(num_steps, check_vma):
    # Of a budget of steps, and of one cut short by its tolerance: `y0` tells.
    def local(rates, y0):
        def one(a):
            tol = jnp.where(a > 0.5, 0.0, 1e-9)
            solver = eqlx.FixedPointIteration(tol, tol)
            fn = lambda y, a: a * y + 1
            return eqlx.fixed_point(
                fn,
                solver,
                y0,
                a,
                max_steps=num_steps,
                adjoint=eqlx.RecursiveCheckpointAdjoint(),
                throw=False,
            ).value

        return jax.vmap(one)(rates)

    mesh = _mesh(AxisType.Auto)
    rates, y0 = jnp.append(jnp.linspace(0.6, 0.9, 15), 1e-6), jnp.array(0.3)
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P("b"), P()), out_specs=P("b"), check_vma=check_vma
    )
    got = jax.jit(jax.jacrev(run, (0, 1)))(rates, y0)
    # Of the last the second step is within the tolerance.
    steps = np.append(np.full(15, num_steps), min(num_steps, 2))
    n, a = np.arange(num_steps)[None], np.asarray(rates)[:, None]
    terms = np.where(n < steps[:, None], a**n, 0)
    of_rates = steps * 0.3 * a[:, 0] ** (steps - 1)
    of_rates += np.where(n < steps[:, None], n * a ** np.maximum(n - 1, 0), 0).sum(1)
    assert np.allclose(run(rates, y0), a[:, 0] ** steps * 0.3 + terms.sum(1))
    assert np.allclose(jnp.diagonal(got[0]), of_rates)
    assert np.allclose(got[1], a[:, 0] ** steps)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_values_and_gradients_can_be_exported(getkey, platform, batching):
    w, xs = _batch(getkey, jnp.float32)

    def loss(w, xs):
        one = lambda x: _solve(w, x, name="traced", batching=batching).value
        return jnp.sum(jax.vmap(one)(xs))

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    exported = export.export(run, platforms=[platform])(w, xs)
    again = export.deserialize(exported.serialize())
    if platform == "cpu":
        value, (got_w, _) = again.call(w, xs)
        expected, grad_w, _ = batch_reference(w, xs)
        assert np.allclose(value, expected.sum(), rtol=1e-4)
        assert relative_error(got_w, grad_w) < 1e-4


@pytest.mark.parametrize("batch", [False, True])
def test_no_host_callback_without_throw(getkey, batch):
    w, xs = _batch(getkey)
    one = lambda w, x: _solve(w, x).value
    if batch:
        loss = lambda w, xs: jnp.sum(jax.vmap(one, in_axes=(None, 0))(w, xs))
    else:
        loss = lambda w, xs: jnp.sum(one(w, xs[0]))
    grad = jax.value_and_grad(loss)
    text = optimised_hlo(grad, w, xs)
    assert "custom-call" not in text  # A callback is one.


@pytest.mark.parametrize("fn", [eqlx.max_norm, eqlx.rms_norm, eqlx.two_norm])
def test_norms_in_shard_map(fn):
    mesh = _mesh(AxisType.Explicit)
    xs = jax.device_put(jnp.ones((8, 3)), jax.NamedSharding(mesh, P("b")))
    run = _sharded(mesh, jax.vmap(jax.value_and_grad(fn)), P("b"), P("b"))
    value, _ = run(xs)
    assert np.allclose(value, {"two_norm": 3**0.5}.get(fn.__name__, 1.0))


def test_a_batch_sharded_array_without_shard_map_is_right(getkey):
    # Slow, since every device waits for all of them, but not wrong.
    w, xs = _batch(getkey)
    mesh = _mesh(AxisType.Auto)
    run = jax.jit(jax.vmap(lambda w, x: _solve(w, x).value, in_axes=(None, 0)))
    value = run(*_put(mesh, w, xs))
    assert np.max(np.abs(value - batch_reference(w, xs)[0])) < 1e-9


def test_checkpoint_and_scan_around_a_solve(getkey):
    w, xs = _batch(getkey)
    one = jax.checkpoint(lambda w, x: _solve(w, x).value)

    def loss(w):
        step = lambda total, x: (total + jnp.sum(one(w, x)), None)
        return jax.lax.scan(step, jnp.zeros(()), xs)[0]

    assert relative_error(jax.jit(jax.grad(loss))(w), batch_reference(w, xs)[1]) < 1e-8
