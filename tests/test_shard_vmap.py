"""`shard_vmap`: the values of `vmap`, with each device on its own samples."""

import collections

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from equilax.sharding import shard_vmap
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import batch_reference, relative_error, tanh_cell, tanh_problem
from .hlo import program


_SIZE, _TOL = 5, 1e-11


class _Layer(eqx.Module):
    """An equilibrium of `tanh(w z + x)`, as a pytree with parameters."""

    w: jax.Array

    def solve(self, x):
        solver = eqlx.Anderson(0.0, _TOL)
        start, args = jnp.zeros(_SIZE, x.dtype), (self.w, x)
        return eqlx.fixed_point(tanh_cell, solver, start, args, throw=False)

    def __call__(self, x):
        return self.solve(x).value


def _mesh(shape=(8,), names=("b",), axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def _batch(getkey, num):
    w, _ = tanh_problem(getkey(), _SIZE, 0.7)
    scale = jnp.linspace(0.01, 2, num)[:, None]
    return w, scale * jr.normal(getkey(), (num, _SIZE))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("num", [16, 11])
def test_values_steps_and_gradients(getkey, num, axis_type):
    w, xs = _batch(getkey, num)
    mesh = _mesh(axis_type=axis_type)

    def loss(w, xs):
        sol = shard_vmap(_Layer(w).solve, mesh, "b")(xs)
        return jnp.sum(sol.value), sol

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, sol), (got_w, got_x) = run(w, xs)
    value, grad_w, grad_x = batch_reference(w, xs)
    assert relative_error(sol.value, value) < 1e-9
    assert relative_error(got_w, grad_w) < 1e-8
    assert relative_error(got_x, grad_x) < 1e-8
    assert sol.stats["num_steps"].shape == (num,)
    assert bool(jnp.all(sol.result == eqlx.RESULTS.successful))


def test_fewer_samples_than_devices_and_none(getkey):
    w, xs = _batch(getkey, 3)
    run = shard_vmap(_Layer(w), _mesh(), "b")
    assert relative_error(run(xs), batch_reference(w, xs)[0]) < 1e-9
    assert run(xs[:0]).shape == (0, _SIZE)


def test_no_collective_in_a_loop_and_one_for_all_gradients(getkey):
    w, xs = _batch(getkey, 16)
    mesh = _mesh()

    def loss(layer, shift, xs):
        run = shard_vmap(lambda s, x: layer(x + s), mesh, "b", in_axes=(None, 0))
        return jnp.sum(run(shift, xs) ** 2)

    compiled = program(jax.grad(loss, 1), _Layer(w), jnp.ones(_SIZE), xs)
    assert len(compiled.loops()) >= 2
    assert compiled.in_loops() == []
    of_layer = lambda layer, xs: jnp.sum(shard_vmap(layer, mesh, "b")(xs) ** 2)
    compiled = program(jax.value_and_grad(of_layer), _Layer(w), xs)
    assert compiled.in_loops() == []
    assert compiled.all() == ["all-reduce"]


def test_a_slow_sample_holds_up_no_other_device():
    # The loop of a device evaluates all of its samples until the last has stopped.
    seen = collections.Counter()

    def note(which):
        seen[int(which)] += 1

    def one(which, rate):
        def fn(y, args):
            jax.debug.callback(note, args[0])
            return args[1] * y + 1

        solver = eqlx.FixedPointIteration(0.0, 1e-9)
        start, args = jnp.zeros(()), (which, rate)
        sol = eqlx.fixed_point(fn, solver, start, args, max_steps=5000, throw=False)
        return sol.value, sol.stats["num_steps"]

    rates = jnp.full(16, 0.5).at[14:].set(0.99)
    value, steps = shard_vmap(one, _mesh(), "b")(jnp.arange(16), rates)
    jax.effects_barrier()
    assert np.allclose(value, 1 / (1 - rates), rtol=1e-6)
    assert min(steps[14:]) > 1500
    assert max(steps[:14]) < 40
    assert min(seen[14], seen[15]) > 1500
    assert max(seen[k] for k in range(14)) < 40


def test_a_mesh_of_two_axes_and_a_program_around(getkey):
    w, xs = _batch(getkey, 10)
    mesh, layer = _mesh((4, 2), ("b", "m")), _Layer(w)
    expected = batch_reference(w, xs)[0]
    for names in ("b", ("b", "m")):
        assert relative_error(shard_vmap(layer, mesh, names)(xs), expected) < 1e-9
    inner = lambda xs: shard_vmap(layer, mesh, "b")(xs)
    run = jax.shard_map(inner, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"m"})
    assert relative_error(jax.jit(run)(xs), expected) < 1e-9


def test_arguments_of_any_structure(getkey):
    w, xs = _batch(getkey, 10)
    axes = (None, {"x": 1, "flag": None, "none": 0}, 0)

    def fn(layer, tree, key):
        static = (tree["flag"], tree["none"])
        return {"z": layer(tree["x"]), "noise": jr.normal(key), "static": static}

    tree = {"x": xs.T, "flag": "a string", "none": None}
    keys = jr.split(jr.key(0), 10)
    out = shard_vmap(fn, _mesh(), "b", in_axes=axes)(_Layer(w), tree, keys)
    assert relative_error(out["z"], batch_reference(w, xs)[0]) < 1e-9
    assert jnp.array_equal(out["noise"], jax.vmap(jr.normal)(keys))
    assert out["static"] == ("a string", None)


def test_weights_that_are_split_and_gathered_around_a_layer(getkey):
    w, xs = _batch(getkey, 16)
    w = jnp.pad(w, ((0, 3), (0, 0)))
    _, grad_w, _ = batch_reference(w[:_SIZE], xs)

    def local(w, xs):
        whole = jax.lax.all_gather(w, "b", tiled=True)[:_SIZE]
        return jax.lax.psum(jnp.sum(jax.vmap(_Layer(whole))(xs)), "b")

    run = jax.shard_map(local, mesh=_mesh(), in_specs=(P("b"), P("b")), out_specs=P())
    assert program(jax.grad(run), w, xs).in_loops() == []
    got = jax.jit(jax.grad(run))(w, xs)
    assert relative_error(got[:_SIZE], grad_w) < 1e-8
    assert jnp.all(got[_SIZE:] == 0)


def test_pmap(getkey):
    w, xs = _batch(getkey, 16)
    value, grad_w, grad_x = batch_reference(w, xs)
    local = lambda w, xs: jnp.sum(jax.vmap(_Layer(w))(xs))

    def step(w, xs):
        grad_w, grad_x = jax.grad(local, (0, 1))(w, xs)
        return jax.vmap(_Layer(w))(xs), jax.lax.psum(grad_w, "d"), grad_x

    split = xs.reshape(8, 2, _SIZE)
    got, got_w, got_x = jax.pmap(step, "d", in_axes=(None, 0))(w, split)
    assert relative_error(got.reshape(xs.shape), value) < 1e-9
    assert relative_error(got_w[3], grad_w) < 1e-8
    assert relative_error(got_x.reshape(xs.shape), grad_x) < 1e-8


def test_errors_say_what_to_do(getkey):
    w, xs = _batch(getkey, 8)
    mesh, layer = _mesh(), _Layer(w)
    with pytest.raises(ValueError, match=r"`axis_name` must name axes of `mesh`.*'q'"):
        shard_vmap(layer, mesh, "q")
    with pytest.raises(ValueError, match=r"one size.*8 in `args\[0\]`, 7 in `args"):
        shard_vmap(lambda a, b: a + b, mesh, "b")(xs, xs[:7])
    with pytest.raises(ValueError, match="`in_axes` must be a prefix"):
        shard_vmap(lambda a, b: a + b, mesh, "b", in_axes=(0,))(xs, xs)
    with pytest.raises(ValueError, match=r"`in_axes` must be axes.*2 for `args\[0\]`"):
        shard_vmap(layer, mesh, "b", in_axes=2)(xs)
    with pytest.raises(ValueError, match="`in_axes` must map at least one array"):
        shard_vmap(layer, mesh, "b", in_axes=None)(xs)
    inside = lambda xs: shard_vmap(layer, mesh, "b")(xs)
    run = jax.shard_map(inside, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
    with pytest.raises(ValueError, match=r"taken; got \['b'\].*`jax.vmap`"):
        run(xs)


def _mean_cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x - jax.lax.pmean(z, "b"))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_collective_along_the_batch_is_an_error_and_no_deadlock(getkey, check_vma):
    w, xs = _batch(getkey, 8)

    def local(x):
        solver = eqlx.Anderson(0.0, _TOL)
        start, args = jnp.zeros(_SIZE), (w, x[0])
        sol = eqlx.fixed_point(_mean_cell, solver, start, args, throw=False)
        return sol.value[None]

    run = jax.shard_map(
        local, mesh=_mesh(), in_specs=P("b"), out_specs=P("b"), check_vma=check_vma
    )
    with pytest.raises(ValueError, match=r"mesh axis 'b'.*`axis_name='b'`.*gather"):
        run(xs)


def test_a_lineax_solver_is_refused_with_what_to_take_instead(getkey):
    w, xs = _batch(getkey, 8)

    def one(x):
        solver, adjoint = eqlx.Anderson(0.0, _TOL), eqlx.ImplicitAdjoint(lx.LU())
        start, args = jnp.zeros(_SIZE), (w, x)
        return eqlx.fixed_point(
            tanh_cell, solver, start, args, adjoint=adjoint, throw=False
        ).value

    loss = lambda xs: jnp.sum(shard_vmap(one, _mesh(), "b")(xs))
    with pytest.raises(ValueError, match=r"`linear_solver=LU`.*FixedPointLinearSolver"):
        jax.grad(loss)(xs)
