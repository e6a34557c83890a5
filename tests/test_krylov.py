"""GMRES against dense solves, alone, in a batch and as an adjoint."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from .helpers import dense_sensitivity, newton, tanh_cell, tanh_problem


def _solve(matrix, vector, solver, tolerance=1e-12, **kwargs):
    mv = lambda x: matrix @ x
    return solver.solve(mv, vector, eqlx.Terms(tolerance, **kwargs))


def _arnoldi_residuals(matrix, vector, num):
    """The smallest residual over each Krylov space, by dense least squares."""
    krylov, found = [vector], []
    for _ in range(num):
        basis, _ = np.linalg.qr(np.stack(krylov, axis=1))
        moved = matrix @ basis
        weights, *_ = np.linalg.lstsq(moved, vector, rcond=None)
        found.append(np.linalg.norm(vector - moved @ weights))
        krylov.append(matrix @ krylov[-1] / np.linalg.norm(krylov[-1]))
    return found


def test_its_residuals_are_the_smallest_in_the_krylov_space(getkey):
    matrix = np.asarray(np.eye(12) + 0.6 * jr.normal(getkey(), (12, 12)))
    vector = np.asarray(jr.normal(getkey(), (12,)))
    expected = _arnoldi_residuals(matrix, vector, 9)
    for num in (1, 2, 5, 9):
        solver = eqlx.KrylovLinearSolver(max_steps=num)
        sol = _solve(jnp.asarray(matrix), jnp.asarray(vector), solver)
        true = np.linalg.norm(vector - matrix @ np.asarray(sol.value))
        assert np.isclose(true, expected[num - 1], rtol=1e-9)
        assert np.isclose(sol.stats["residual"], true, rtol=1e-9)
        assert sol.stats["num_steps"] == num
        assert sol.result == eqlx.RESULTS.max_steps_reached


@pytest.mark.parametrize("restart", [1, 3, 8, 30])
def test_restarts_solve_a_system_that_is_nearly_the_identity(getkey, restart):
    matrix = jnp.eye(25) + 0.08 * jr.normal(getkey(), (25, 25))
    vector = jr.normal(getkey(), (25,))
    sol = _solve(matrix, vector, eqlx.KrylovLinearSolver(restart=restart))
    assert sol.result == eqlx.RESULTS.successful
    assert np.allclose(sol.value, np.linalg.solve(matrix, vector), atol=1e-10)


def test_a_restart_that_gains_nothing_is_told(getkey):
    shift = jnp.eye(25)[jnp.roll(jnp.arange(25), 1)]
    vector = jnp.eye(25)[3]
    short = _solve(shift, vector, eqlx.KrylovLinearSolver(restart=10))
    assert short.result == eqlx.RESULTS.stagnation
    assert short.stats["num_steps"] <= 11
    whole = _solve(shift, vector, eqlx.KrylovLinearSolver(restart=25))
    assert whole.result == eqlx.RESULTS.successful
    assert np.allclose(whole.value, shift.T @ vector, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_it_is_linear_in_its_right_hand_side(getkey, scale):
    matrix = (jnp.eye(6) + 0.2 * jr.normal(getkey(), (6, 6))).astype(jnp.float32)
    vector = jr.normal(getkey(), (6,)).astype(jnp.float32)
    sol = _solve(matrix, scale * vector, eqlx.KrylovLinearSolver(), 1e-6)
    expected = np.linalg.solve(np.asarray(matrix, np.float64), vector)
    assert sol.result == eqlx.RESULTS.successful
    assert np.allclose(np.asarray(sol.value) / scale, expected, rtol=1e-5, atol=1e-5)


def test_zero_and_singular_and_not_a_number():
    zero = _solve(jnp.eye(3), jnp.zeros(3), eqlx.KrylovLinearSolver())
    assert zero.stats["num_steps"] == 0
    assert zero.result == eqlx.RESULTS.successful
    assert jnp.all(zero.value == 0)
    singular = jnp.diag(jnp.array([1.0, 2.0, 0.0]))
    sol = _solve(singular, jnp.ones(3), eqlx.KrylovLinearSolver())
    assert sol.result != eqlx.RESULTS.successful
    assert sol.stats["residual"] > 0.9
    bad = _solve(jnp.eye(3), jnp.array([1.0, jnp.nan, 0.0]), eqlx.KrylovLinearSolver())
    assert bad.result == eqlx.RESULTS.nonfinite


def test_a_tree_of_complex_and_real_leaves(getkey):
    a = 0.2 * jr.normal(getkey(), (3, 3), jnp.complex128)
    a = a + jnp.eye(3, dtype=a.dtype)
    tree = {"z": jr.normal(getkey(), (3,), a.dtype), "x": jnp.array([[2.0]])}
    mv = lambda t: {"z": a @ t["z"] + t["x"][0, 0].astype(a.dtype), "x": 3 * t["x"]}
    sol = eqlx.KrylovLinearSolver().solve(mv, tree, eqlx.Terms(1e-12))
    x = 2 / 3
    z = np.linalg.solve(np.asarray(a), np.asarray(tree["z"]) - x)
    assert np.allclose(sol.value["x"], x, atol=1e-11)
    assert np.allclose(sol.value["z"], z, atol=1e-11)


@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_each_sample_of_a_batch_stops_by_itself(getkey, batching):
    size, batch = 12, 9
    widths = jnp.linspace(0.0, 1.0, batch)
    noise = jr.normal(getkey(), (size, size)) / size**0.5
    vectors = jr.normal(getkey(), (batch, size)).at[4].set(jnp.nan)
    solver = eqlx.KrylovLinearSolver(restart=5)

    @jax.jit
    @jax.vmap
    def run(width, vector):
        mv = lambda x: x + 0.4 * width * (noise @ x)
        return solver.solve(mv, vector, eqlx.Terms(1e-10, batching))

    sol = run(widths, vectors)
    is_good = (sol.result == eqlx.RESULTS.successful).tolist()
    assert is_good == [i != 4 for i in range(batch)]
    assert sol.stats["num_steps"][0] == 1
    assert len(set(sol.stats["num_steps"].tolist())) > 3
    for i in range(batch):
        if i != 4:
            matrix = np.eye(size) + 0.4 * float(widths[i]) * np.asarray(noise)
            expected = np.linalg.solve(matrix, np.asarray(vectors[i]))
            assert np.allclose(sol.value[i], expected, atol=1e-8)


def test_an_adjoint_where_the_fixed_point_does_not_contract(getkey):
    # Eigenvalues of J far outside the unit circle; I - J is the cyclic shift.
    n = 25
    shift = jnp.eye(n)[jnp.roll(jnp.arange(n), 1)]
    c = jnp.eye(n)[0]
    adjoint = eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver(restart=n))

    def solve(c):
        return eqlx.fixed_point(
            lambda z, c: z - shift @ z + c,
            eqlx.Anderson(1e-10, 1e-10),
            shift.T @ c,
            c,
            adjoint=adjoint,
        ).value

    _, vjp = jax.vjp(solve, c)
    cotangent = jnp.eye(n)[3]
    expected = np.linalg.solve(np.asarray(shift).T, np.asarray(cotangent))
    assert np.allclose(vjp(cotangent)[0], expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_gradients_in_every_dtype(getkey, dtype):
    args = tanh_problem(getkey(), 8, 0.8, dtype)
    eps = float(jnp.finfo(dtype).eps)
    adjoint = eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver())

    def loss(args):
        sol = eqlx.fixed_point(
            tanh_cell,
            eqlx.Anderson(0.0, 8 * eps),
            jnp.zeros(8, dtype),
            args,
            adjoint=adjoint,
            throw=False,
        )
        return jnp.sum(sol.value)

    grad = jax.jit(jax.grad(loss))(args)
    z = newton(tanh_cell, jnp.zeros(8), args)
    expected = dense_sensitivity(tanh_cell, z, args)
    for got, leaf in zip(grad, expected, strict=True):
        assert got.dtype == dtype
        dense = np.asarray(leaf).sum(0)
        error = np.max(np.abs(np.asarray(got, np.float64) - dense))
        # The errors of z and of the system are 8 roundings times 1 / (1 - 0.8).
        assert error < 300 * eps * np.max(np.abs(dense))


def test_inside_shard_map_and_with_a_batch_axis(getkey):
    w, _ = tanh_problem(getkey(), 6, 0.8)
    xs = jr.normal(getkey(), (8, 6))
    adjoint = eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver(restart=4))
    solver = eqlx.Anderson(0.0, 1e-12)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def alone(x):
        return eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(6), (w, x), adjoint=adjoint, throw=False
        ).value

    def together(xs):
        fn = lambda z, xs: jnp.tanh(z @ w.T + xs)
        return eqlx.fixed_point(
            fn, solver, 0 * xs, xs, adjoint=adjoint, throw=False, batch_axis=0
        ).value

    sharded = jax.shard_map(
        jax.vmap(alone), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    expected = []
    for x in xs:
        z = newton(tanh_cell, jnp.zeros(6), (w, x))
        expected.append(np.asarray(dense_sensitivity(tanh_cell, z, (w, x))[1]).sum(0))
    for solve in (sharded, together):
        grad = jax.jit(jax.grad(lambda xs, solve=solve: jnp.sum(solve(xs))))(xs)
        assert np.allclose(grad, np.stack(expected), atol=1e-9)


def test_as_a_solver_of_lineax(getkey):
    matrix = jnp.eye(5) + 0.2 * jr.normal(getkey(), (5, 5))
    vector = jr.normal(getkey(), (5,))
    operator = lx.MatrixLinearOperator(matrix)
    solve = lambda v: (
        lx.linear_solve(operator, v, eqlx.KrylovLinearSolver(rtol=1e-12)).value
    )
    assert np.allclose(solve(vector), np.linalg.solve(matrix, vector), atol=1e-10)
    grad = jax.grad(lambda v: jnp.sum(solve(v)))(vector)
    assert np.allclose(grad, np.linalg.solve(matrix.T, np.ones(5)), atol=1e-10)
