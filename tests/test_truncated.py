"""Truncated and unrolled derivatives, against their own closed forms."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import (
    dense_sensitivity,
    newton,
    relative_error,
    solver_list,
    tanh_cell,
    tanh_problem,
)


@pytest.mark.parametrize("num_terms", [0, 1, 2, 5])
@pytest.mark.parametrize("damp", [0.0, 0.4])
def test_neumann_is_its_partial_sum(getkey, num_terms, damp):
    a = 0.8 * jnp.linalg.qr(jr.normal(getkey(), (4, 4)))[0]
    b, c = jr.normal(getkey(), (4,)), jr.normal(getkey(), (4,))
    adjoint = eqlx.ImplicitAdjoint(eqlx.Neumann(num_terms, damp))
    solver = eqlx.Anderson(0.0, 1e-13)

    def solve(b):
        fn = lambda y, b: a @ y + b
        return eqlx.fixed_point(fn, solver, jnp.zeros(4), b, adjoint=adjoint).value

    term = damp * np.eye(4) + (1 - damp) * np.asarray(a)
    series = sum(np.linalg.matrix_power(term, j) for j in range(num_terms + 1))
    series = (1 - damp) * series
    assert jnp.allclose(jax.vjp(solve, b)[1](c)[0], series.T @ c, rtol=1e-12)
    assert jnp.allclose(jax.jvp(solve, (b,), (c,))[1], series @ c, rtol=1e-12)
    both = jax.vmap(lambda c: jax.vjp(solve, b)[1](c)[0])(jnp.stack([c, 2 * c]))
    assert jnp.allclose(both[1], 2 * series.T @ c, rtol=1e-12)


@pytest.mark.parametrize("num_terms", [0, 3])
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_neumann_is_the_gradient_of_unrolled_steps(getkey, num_terms, damp):
    # Phantom gradients: damped steps from the solution, which is held constant.
    args = tanh_problem(getkey(), 5, 0.9)
    start = jnp.asarray(newton(tanh_cell, jnp.zeros(5), args))
    solver = eqlx.Anderson(0.0, 1e-13)
    adjoint = eqlx.ImplicitAdjoint(eqlx.Neumann(num_terms, damp))

    def solve(args):
        return eqlx.fixed_point(
            tanh_cell, solver, start, args, adjoint=adjoint
        ).value.sum()

    def unrolled(args):
        z = start
        for _ in range(num_terms + 1):
            z = (1 - damp) * tanh_cell(z, args) + damp * z
        return z.sum()

    assert relative_error(jax.grad(solve)(args), jax.grad(unrolled)(args)) < 1e-11


def test_checkpointing_is_the_derivative_of_the_steps_taken():
    adjoint = eqlx.RecursiveCheckpointAdjoint()
    solver = eqlx.FixedPointIteration(0.0, 0.0)

    def solve(y0, b):
        fn = lambda y, b: 0.5 * y + b
        return eqlx.fixed_point(fn, solver, y0, b, max_steps=5, adjoint=adjoint).value

    g_start, g_b = jax.grad(solve, (0, 1))(jnp.array(0.0), jnp.array(1.0))
    assert jnp.allclose(g_start, 0.5**5)
    assert jnp.allclose(g_b, 2 * (1 - 0.5**5))


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ("picard", 2),
        ("type_i", None),
        ("broyden", None),
        ("reversible", None),
    ],
)
def test_checkpointing_converges_to_the_implicit_gradient(getkey, name, checkpoints):
    adjoint = eqlx.RecursiveCheckpointAdjoint(checkpoints)
    solver = solver_list(0.0, 1e-13)[name]
    args = tanh_problem(getkey(), 5, 0.8)

    def solve(args):
        start = jnp.zeros(5)
        return eqlx.fixed_point(tanh_cell, solver, start, args, adjoint=adjoint).value

    z = newton(tanh_cell, jnp.zeros(5), args)
    dense = dense_sensitivity(tanh_cell, z, args)
    expected = jax.tree.map(lambda d: d.sum(0), dense)
    got = jax.grad(lambda args: solve(args).sum())(args)
    assert relative_error(got, expected) < 1e-9
    w, x = args
    xs = jnp.stack([x, x])
    batched = jax.grad(lambda xs: jax.vmap(lambda x: solve((w, x)).sum())(xs).sum())
    assert relative_error(batched(xs)[1], expected[1]) < 1e-9
