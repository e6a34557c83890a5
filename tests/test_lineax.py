"""Our linear solvers in Lineax, and Lineax's in our adjoint."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest


def test_our_solvers_run_in_lineax(getkey):
    a = 0.4 * jnp.linalg.qr(jr.normal(getkey(), (5, 5)))[0]
    b = jr.normal(getkey(), (5,))
    matrix = jnp.eye(5) - a
    operator = lx.MatrixLinearOperator(matrix)
    solver = eqlx.FixedPointLinearSolver(eqlx.Anderson(0.0, 1e-12))
    sol = lx.linear_solve(operator, b, solver)
    assert jnp.allclose(sol.value, np.linalg.solve(matrix, b), rtol=1e-10)
    assert sol.stats["num_steps"] > 0
    sol = lx.linear_solve(operator.T, b, solver)
    assert jnp.allclose(sol.value, np.linalg.solve(matrix.T, b), rtol=1e-10)
    grad = jax.grad(lambda b: lx.linear_solve(operator, b, solver).value.sum())(b)
    assert jnp.allclose(grad, np.linalg.solve(matrix.T, np.ones(5)), rtol=1e-9)
    one_step = lx.linear_solve(operator, b, eqlx.Neumann(0))
    assert jnp.allclose(one_step.value, b)
    failed = lx.linear_solve(
        lx.MatrixLinearOperator(-3 * jnp.eye(5)),
        b,
        eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, 1e-9)),
        throw=False,
    )
    assert failed.result != lx.RESULTS.successful


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10])
@pytest.mark.parametrize("linear_solver", [lx.GMRES(1e-6, 1e-6), lx.LU()])
def test_the_scale_of_a_cotangent_does_not_matter_to_lineax(scale, linear_solver):
    # The absolute tolerance of an iterative solver would call zero a solution.
    dense = np.array([[-3.0, 0.1, 0.0], [0.0, 0.5, 0.2], [0.1, 0.0, 1.8]])
    a, ct = jnp.asarray(dense, jnp.float32), np.array([1.0, -2.0, 0.5])

    def loss(c):
        sol = eqlx.fixed_point(
            lambda y, c: a @ y + c,
            eqlx.Anderson(1e-6, 1e-6),
            jnp.zeros(3, jnp.float32),
            c,
            adjoint=eqlx.ImplicitAdjoint(linear_solver),
            throw=False,
        )
        return jnp.sum(sol.value * jnp.asarray(ct * scale, jnp.float32))

    grad = jax.jit(jax.grad(loss))(jnp.array([0.1, -0.2, 0.3], jnp.float32))
    expected = np.linalg.solve(np.eye(3) - dense.T, ct)
    assert np.allclose(np.asarray(grad, np.float64) / scale, expected, rtol=1e-4)


_DEFINITE = frozenset({lx.positive_semidefinite_tag, lx.symmetric_tag})


@pytest.mark.parametrize(
    ("linear_solver", "tags"),
    [
        (lx.Cholesky(), _DEFINITE),
        (lx.CG(1e-12, 1e-12), _DEFINITE),
        (lx.AutoLinearSolver(well_posed=True), _DEFINITE),
        (lx.AutoLinearSolver(well_posed=True), frozenset()),
        (lx.QR(), frozenset()),
    ],
)
def test_tags_say_what_the_system_is(getkey, linear_solver, tags):
    half = jr.normal(getkey(), (4, 4)) / 4
    a = -half @ half.T  # I - a is symmetric and positive definite.
    b, ct = jr.normal(getkey(), (4,)), jr.normal(getkey(), (4,))

    def solve(a, b):
        fn = lambda y, p: p[0] @ y + p[1]
        adjoint = eqlx.ImplicitAdjoint(linear_solver)
        solver = eqlx.Anderson(0.0, 1e-12)
        return eqlx.fixed_point(
            fn, solver, jnp.zeros(4), (a, b), adjoint=adjoint, tags=tags
        ).value

    u = np.linalg.solve(np.eye(4) - np.asarray(a).T, ct)
    z = np.linalg.solve(np.eye(4) - np.asarray(a), b)
    g_a, g_b = jax.jit(jax.vjp(solve, a, b)[1])(ct)
    assert np.allclose(g_b, u, rtol=1e-9)
    assert np.allclose(g_a, np.outer(u, z), rtol=1e-9)
    t = jax.jvp(lambda b: solve(a, b), (b,), (ct,))[1]
    assert np.allclose(t, np.linalg.solve(np.eye(4) - np.asarray(a), ct), rtol=1e-9)


def test_a_wrong_tag_is_the_error_of_lineax():
    solver, fn = eqlx.Anderson(0.0, 1e-9), lambda y, b: 0.5 * y + b
    solve = lambda b: (
        eqlx.fixed_point(
            fn, solver, jnp.zeros(2), b, adjoint=eqlx.ImplicitAdjoint(lx.Cholesky())
        ).value
    )
    with pytest.raises(ValueError, match="positive or negative definite"):
        jax.grad(lambda b: jnp.sum(solve(b)))(jnp.ones(2))
