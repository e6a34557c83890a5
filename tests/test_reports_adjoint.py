"""Losses that hold a residual or a Jacobian, of the kinds of `tests/README.md`."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import newton, relative_error, tanh_cell, tanh_problem


_SOLVER = eqlx.FixedPointIteration(0.0, 1e-12)
_LEAN = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_SOLVER))


@pytest.mark.parametrize("norm", [eqlx.max_norm, eqlx.rms_norm, eqlx.two_norm])
@pytest.mark.parametrize(
    "adjoint", [_LEAN, eqlx.RecursiveCheckpointAdjoint()], ids=["implicit", "unrolled"]
)
def test_a_residual_of_zero_in_a_loss_is_no_nan_in_its_gradient(norm, adjoint):
    def loss(c):
        solver = eqlx.FixedPointIteration(0.0, 1e-6, norm)
        fn, start = (lambda y, c: 0.5 * y + c), jnp.full(3, 2.0)
        sol = eqlx.fixed_point(
            fn, solver, start, c, adjoint=adjoint, throw=False, max_steps=20
        )
        mine = norm(fn(sol.value, c) - sol.value)
        return jnp.sum(sol.value) + sol.stats["residual"] + mine

    grad = jax.jit(jax.grad(loss))(jnp.ones(3))
    assert np.all(np.isfinite(grad))
    # Unrolled there was no step, so that nothing depends on `c`.
    expected = 2 if adjoint is _LEAN else 0
    assert np.allclose(grad, expected, atol=1e-9)


def test_a_penalty_on_the_jacobian_at_the_solution_reaches_the_weights(getkey):
    # The mean over all signs of |J^T v|^2 / n is the squared Frobenius norm by n.
    w, x = tanh_problem(getkey(), 3, 0.7)
    keys = jr.split(getkey(), 400)

    def solve(w):
        return eqlx.fixed_point(
            tanh_cell, _SOLVER, 0 * x, (w, x), adjoint=_LEAN, max_steps=400
        ).value

    def exact(w):
        z = solve(w)
        return jnp.sum(jax.jacrev(tanh_cell)(z, (w, x)) ** 2) / 3

    def by_newton(w):
        z = newton(tanh_cell, 0 * x, (w, x))
        slopes = 1 - np.asarray(z) ** 2
        return np.sum((slopes[:, None] * np.asarray(w)) ** 2) / 3

    value, grad = jax.jit(jax.value_and_grad(exact))(w)
    assert np.isclose(value, by_newton(w), rtol=1e-9)
    expected, h = np.zeros((3, 3)), 1e-5
    for i, j in np.ndindex(3, 3):
        shift = np.zeros((3, 3))
        shift[i, j] = h
        expected[i, j] = (by_newton(w + shift) - by_newton(w - shift)) / (2 * h)
    assert relative_error(grad, expected) < 1e-7

    def estimate(w):
        z = solve(w)
        one = lambda key: eqlx.jacobian_penalty(tanh_cell, z, (w, x), key=key)
        return jnp.mean(jax.vmap(one)(keys))

    estimated, its_grad = jax.jit(jax.value_and_grad(estimate))(w)
    # A mean of 400: within a few standard errors.
    assert np.isclose(estimated, value, rtol=0.2)
    assert relative_error(its_grad, expected) < 0.2


def test_the_penalty_of_an_affine_map_has_its_matrix_as_gradient():
    a = jnp.array([[0.2, 0.5], [-0.3, 0.1]])

    def penalty(a):
        fn = lambda y, a: a @ y + jnp.array([2.0, -1.0])
        sol = eqlx.fixed_point(
            fn, _SOLVER, jnp.zeros(2), a, adjoint=_LEAN, max_steps=400
        )
        return jnp.sum(jax.jacfwd(fn)(sol.value, a) ** 2) / 2

    value, grad = jax.value_and_grad(penalty)(a)
    assert np.isclose(value, (0.04 + 0.25 + 0.09 + 0.01) / 2)
    assert np.allclose(grad, a, rtol=1e-12)


def test_a_start_at_the_solution_has_the_gradient_whatever_the_solver():
    # Differences of iterates, of which there are none, are in no derivative.
    kinds = (eqlx.Anderson, eqlx.Broyden, eqlx.AndersonTypeI, eqlx.Squarem, eqlx.Newton)
    start, fn = jnp.full(2, 2.0), lambda y, c: 0.5 * y + c

    def losses(c):
        total = jnp.zeros(())
        for kind in kinds:
            sol = eqlx.fixed_point(
                fn, kind(1e-8, 1e-8), start, c, adjoint=_LEAN, throw=False
            )
            total = total + jnp.sum(sol.value)
        return total

    grad = jax.jit(jax.grad(losses))(jnp.ones(2))
    assert np.allclose(grad, 2 * len(kinds), rtol=1e-9)
