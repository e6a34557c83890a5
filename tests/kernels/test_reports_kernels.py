"""Maps that call a kernel, and our own, of the kinds that `tests/README.md` lists."""

import functools as ft

import equilax as eqlx
import equilax._fused as fused
import equilax_kernels
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax import nn
from equilax_kernels.affine_fixed_point import tpu
from jax.experimental import pallas as pl

from ..helpers import batch_reference, dense_sensitivity, newton, relative_error


def _tanh_kernel(x_ref, out_ref):
    out_ref[...] = jnp.tanh(x_ref[...])


@jax.custom_jvp
def _tanh(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(_tanh_kernel, out_shape=shape, interpret=True)(x)


@_tanh.defjvp
def _(primals, tangents):
    y = _tanh(primals[0])
    return y, (1 - y * y) * tangents[0]


def test_a_map_that_calls_a_kernel_of_the_users(getkey):
    w = 0.6 * jnp.linalg.qr(jr.normal(getkey(), (4, 4)))[0]
    xs = jr.normal(getkey(), (3, 4))
    solver = eqlx.FixedPointIteration(0.0, 1e-12)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))

    def solve(w, x):
        fn = lambda z, p: _tanh(p[0] @ z + p[1])
        start = jnp.zeros(4)
        return eqlx.fixed_point(
            fn, solver, start, (w, x), adjoint=adjoint, throw=False
        ).value

    zs, grad_w, grad_x = batch_reference(w, xs)
    batch = jax.vmap(solve, (None, 0))
    total = lambda w, xs: (lambda out: (jnp.sum(out), out))(batch(w, xs))
    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, value), got = run(w, xs)
    assert np.max(np.abs(value - zs)) < 1e-10
    assert relative_error(got[0], grad_w) < 1e-9
    assert relative_error(got[1], grad_x) < 1e-9
    # Forward mode has one direction for all: the sum of the gradients along it.
    push = lambda w: jnp.sum(batch(w, xs))
    _, tangent = jax.jit(lambda w, t: jax.jvp(push, (w,), (t,)))(w, jnp.ones_like(w))
    assert np.isclose(tangent, np.sum(grad_w), rtol=1e-9)


@pytest.fixture
def on_tpu(monkeypatch):
    """Has layers solved by the kernel for TPU, interpreted, in tiles of eight rows."""
    asked = []

    def on_platform(reference, kernels):
        del reference
        asked.append(None)
        return kernels["tpu"]()

    run = ft.partial(tpu.affine_fixed_point, tile=8, interpret=True)
    monkeypatch.setattr(fused, "on_platform", on_platform)
    monkeypatch.setattr(tpu, "affine_fixed_point", run)
    jax.clear_caches()  # A trace of an earlier test would be taken for one of this.
    yield asked
    jax.clear_caches()


@pytest.mark.parametrize("which", [(0,), (1, 2)])
def test_our_kernel_by_one_of_its_inputs_in_a_grid_of_two_tiles(getkey, on_tpu, which):
    cell = nn.AffineCell(2, 3, dtype=jnp.float32, key=getkey())
    weight = 0.6 * cell.weight / jnp.linalg.norm(cell.weight, 2)
    xs = jr.normal(getkey(), (11, 2), jnp.float32)
    inputs = (weight.astype(jnp.float32), cell.injection, xs)
    solver = eqlx.FixedPointIteration(0.0, 1e-6)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))

    def solve(inputs):
        where = lambda c: (c.weight, c.injection)
        changed = eqx.tree_at(where, cell, inputs[:2])
        layer = nn.FixedPointLayer(changed, solver, adjoint=adjoint)
        return jnp.sum(jax.vmap(layer)(inputs[2]))

    def of_some(*some):
        whole = list(inputs)
        for k, value in zip(which, some, strict=True):
            whole[k] = value
        return solve(tuple(whole))

    def fn(z, args):
        return jnp.tanh(args[0] @ z + args[1] @ args[2])

    parts = []
    for x in xs:
        args = (inputs[0], inputs[1], x)
        z = newton(fn, jnp.zeros(3), args)
        parts.append([d.sum(0) for d in dense_sensitivity(fn, z, args)])
    by_input = [np.stack([p[k] for p in parts]) for k in range(3)]
    dense = [by_input[0].sum(0), by_input[1].sum(0), by_input[2]]
    some = tuple(inputs[k] for k in which)
    every = tuple(range(len(which)))
    grads = jax.jit(jax.grad(of_some, every))(*some)
    for k, grad in zip(which, grads, strict=True):
        assert relative_error(grad, dense[k]) < 5e-5
    ones = tuple(jnp.ones_like(x) for x in some)
    _, tangent = jax.jit(lambda *t: jax.jvp(of_some, some, t))(*ones)
    assert np.isclose(tangent, sum(np.sum(dense[k]) for k in which), rtol=1e-4)
    assert on_tpu


@pytest.mark.parametrize(
    ("size", "rows"), [(1, 1), (1, 17), (5, 3), (7, 8), (64, 1), (100, 17), (130, 3)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_no_size_is_an_error_where_it_is_lowered_for_tpu(size, rows, dtype):
    # For the compilers of devices, of which not all are at hand: test_aot.py.
    def solve(weight, u):
        return equilax_kernels.affine_fixed_point(
            weight,
            u,
            jnp.zeros_like(u),
            activation=jnp.tanh,
            rtol=0.0,
            atol=1e-2,
            max_steps=50,
        ).value

    weight = jax.ShapeDtypeStruct((size, size), dtype)
    u = jax.ShapeDtypeStruct((rows, size), dtype)
    exported = jax.export.export(jax.jit(solve), platforms=["tpu"])(weight, u)
    assert exported.out_avals[0].shape == (rows, size)
    has_kernel = "tpu_custom_call" in exported.mlir_module()
    none = dtype == jnp.float16 or (size == 1 and dtype == jnp.bfloat16)
    assert has_kernel == (not none)
