"""What an adjoint does where the fixed point does not contract, and preconditioners."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from .helpers import dense_sensitivity, newton, relative_error


def _picard(max_steps=100):
    solver = eqlx.FixedPointIteration(0.0, 1e-10)
    return eqlx.FixedPointLinearSolver(solver, max_steps=max_steps)


def _solve(matrix, vector, solver, **kwargs):
    operator = lx.MatrixLinearOperator(matrix)
    return lx.linear_solve(operator, vector, solver, throw=False, **kwargs)


def test_the_second_method_solves_what_the_first_does_not(getkey):
    expanding = 3 * jnp.linalg.qr(jr.normal(getkey(), (6, 6)))[0]
    ct = jr.normal(getkey(), (6,))
    solver = eqlx.FallbackLinearSolver(_picard(), eqlx.KrylovLinearSolver(1e-12))
    sol = _solve(jnp.eye(6) - expanding, ct, solver)
    dense = np.linalg.solve(np.eye(6) - expanding, ct)
    assert relative_error(sol.value, dense) < 1e-10
    assert sol.result == lx.RESULTS.successful
    assert sol.stats["is_fallback"]
    contracting = expanding / 10
    sol = _solve(jnp.eye(6) - contracting, ct, solver)
    assert (
        relative_error(sol.value, np.linalg.solve(np.eye(6) - contracting, ct)) < 1e-9
    )
    assert not sol.stats["is_fallback"]
    # The steps of the first alone: of u = v + M u until it moves by 1e-10.
    u, num, m = np.asarray(ct), 0, np.asarray(contracting)
    unit = np.max(np.abs(ct))
    while np.max(np.abs(ct + m @ u - u)) >= 1e-10 * unit:
        u, num = ct + m @ u, num + 1
    assert sol.stats["num_steps"] == num


def test_each_sample_falls_back_for_itself(getkey):
    rates = jnp.array([0.5, 3.0, -0.2, jnp.nan, 1.0, -2.0])
    vectors = jr.normal(getkey(), (6, 4))
    solver = eqlx.FallbackLinearSolver(_picard(), eqlx.KrylovLinearSolver(1e-12))
    run = jax.vmap(lambda r, v: _solve((1 - r) * jnp.eye(4), v, solver))
    sol = jax.jit(run)(rates, vectors)
    good = np.array([0, 1, 2, 5])
    expected = vectors[good] / (1 - rates[good])[:, None]
    assert relative_error(sol.value[good], expected) < 1e-9
    assert sol.stats["is_fallback"].tolist() == [False, True, False, True, True, True]
    is_good = (sol.result == lx.RESULTS.successful).tolist()
    assert is_good == [True, True, True, False, False, True]


def test_a_solution_of_which_both_fail_is_the_nearer_one(getkey):
    # One step of either leaves a residual; that of GMRES is the smallest there is.
    matrix = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    v = jnp.array([1.0, 1.0, 1.0])
    solver = eqlx.FallbackLinearSolver(
        _picard(max_steps=1), eqlx.KrylovLinearSolver(1e-12, max_steps=1)
    )
    sol = _solve(matrix, v, solver)
    assert sol.result != lx.RESULTS.successful
    # argmin |v - t A v|: t = (v, A v) / (A v, A v) = 7 / 21.
    assert jnp.allclose(sol.value, v / 3)
    worse = eqlx.FallbackLinearSolver(
        eqlx.KrylovLinearSolver(1e-12, max_steps=1), _picard(max_steps=1)
    )
    assert jnp.allclose(_solve(matrix, v, worse).value, v / 3)


def test_in_a_batch_that_fn_takes_as_one(getkey):
    rates = jnp.array([0.5, -3.0, 0.25])
    fn = lambda zs, b: rates[:, None] * zs + b
    b = jr.normal(getkey(), (3, 2))

    def loss(b):
        sol = eqlx.fixed_point(
            fn,
            eqlx.Anderson(0.0, 1e-10, history_length=3),
            jnp.zeros((3, 2)),
            b,
            adjoint=eqlx.ImplicitAdjoint(eqlx.FallbackLinearSolver(_picard())),
            batch_axis=0,
        )
        return jnp.sum(jnp.array([[1.0, -2.0]]) * sol.value)

    expected = jnp.array([[1.0, -2.0]]) / (1 - rates)[:, None]
    assert relative_error(jax.grad(loss)(b), expected) < 1e-9


def test_nothing_of_the_second_method_runs_for_nothing(getkey):
    # XLA takes out of a loop what does not change in it, and would run it in any case.
    w = 0.1 * jr.normal(getkey(), (24, 24))

    def loss(w, xs):
        fn = lambda z, args: jnp.tanh(args[0] @ z + args[1])
        one = lambda x: (
            eqlx.fixed_point(
                fn, eqlx.Anderson(0.0, 1e-8), 0 * x, (w, x), throw=False
            ).value
        )
        return jnp.sum(jax.vmap(one)(xs))

    text = jax.jit(jax.grad(loss)).lower(w, jnp.zeros((3, 24))).compile().as_text()
    assert text is not None
    entry = text[text.index("\nENTRY") :]
    basis = "f64[3,25,24]"
    assert basis in text
    assert basis not in entry


_shift = np.eye(25)[np.roll(np.arange(25), 1)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_cyclic_shift_on_which_restarts_gain_nothing(dtype):
    # GMRES with a restart below 25 makes no progress at all.
    c = jnp.asarray(_shift, dtype)
    b = jnp.zeros(25, dtype).at[0].set(1.0)
    cotangent = jnp.zeros(25, dtype).at[3].set(1.0)

    def solve(b, adjoint):
        solver = eqlx.Anderson(1e-6, 1e-6)
        return eqlx.fixed_point(
            lambda z, b: z - c @ z + b, solver, c.T @ b, b, adjoint=adjoint, throw=False
        ).value

    pull = lambda adjoint: jax.vjp(lambda b: solve(b, adjoint), b)[1](cotangent)[0]
    expected = np.linalg.solve(_shift.T, np.asarray(cotangent))
    assert np.allclose(pull(eqlx.ImplicitAdjoint()), expected, atol=1e-5)
    # Of a restart that is too small the failure shows.
    small = eqlx.KrylovLinearSolver(restart=10)
    assert jnp.all(jnp.isnan(pull(eqlx.ImplicitAdjoint(small))))


@pytest.mark.parametrize("batch", [False, True])
def test_the_tridiagonal_system_of_a_user(batch):
    # 10 on the diagonal, -1 beside it, a nonlinearity of 0.1: z - A z / 10 is no
    # contraction worth the name for the adjoint of A z + 0.1 sin(z) = b by itself.
    n = 10_000
    x = jnp.linspace(-1, 1, n)

    def system(z, b):
        left = jnp.concatenate([jnp.zeros(1), z[:-1]])
        right = jnp.concatenate([z[1:], jnp.zeros(1)])
        return 10 * z - left - right + 0.1 * jnp.sin(z) - b

    fn = lambda z, b: z - system(z, b)

    def solve(b):
        solver = eqlx.Anderson(0.0, 1e-10, history_length=10)
        return eqlx.fixed_point(fn, solver, jnp.zeros(n), b, max_steps=1000).value

    from_dense = _tridiagonal_gradient(x, np.ones(n))
    if batch:
        grads = jax.vmap(jax.grad(lambda b: jnp.sum(solve(b))))(jnp.stack([x, x]))
        assert relative_error(grads[1], from_dense) < 1e-7
    else:
        assert (
            relative_error(jax.grad(lambda b: jnp.sum(solve(b)))(x), from_dense) < 1e-7
        )


def _tridiagonal_gradient(b, ct):
    """By Newton's method and the Thomas algorithm: the matrix is symmetric."""
    z = np.zeros_like(b)

    def thomas(diagonal, rhs):
        diagonal, rhs = diagonal.copy(), rhs.copy()
        for i in range(1, len(rhs)):
            factor = -1 / diagonal[i - 1]
            diagonal[i] += factor
            rhs[i] -= factor * rhs[i - 1]
        out = np.empty_like(rhs)
        out[-1] = rhs[-1] / diagonal[-1]
        for i in range(len(rhs) - 2, -1, -1):
            out[i] = (rhs[i] + out[i + 1]) / diagonal[i]
        return out

    for _ in range(20):
        left = np.concatenate([[0.0], z[:-1]])
        right = np.concatenate([z[1:], [0.0]])
        residual = 10 * z - left - right + 0.1 * np.sin(z) - np.asarray(b)
        z = z - thomas(10 + 0.1 * np.cos(z), residual)
    return thomas(10 + 0.1 * np.cos(z), np.asarray(ct, float))


def _scaled_problem(getkey, n=60):
    """`I - J` of diagonal 1 to 1e4, and something random beside it."""
    diagonal = np.logspace(0, 4, n)
    matrix = np.diag(diagonal) + 0.1 * np.asarray(jr.normal(getkey(), (n, n)))
    return jnp.asarray(diagonal), jnp.asarray(matrix)


def test_a_preconditioner_counts_in_both_directions(getkey):
    diagonal, matrix = _scaled_problem(getkey)
    # Not symmetric, so that its transpose matters.
    upper = jnp.triu(matrix)
    start = jnp.linalg.solve(matrix, jnp.ones(60))

    def run(preconditioner, ct):
        adjoint = eqlx.ImplicitAdjoint(
            eqlx.KrylovLinearSolver(1e-10, restart=60, max_steps=2000), preconditioner
        )

        def solve(b, monitor):
            fn = lambda z, b: z - matrix @ z + b
            return eqlx.fixed_point(
                fn,
                eqlx.Newton(1e-8, 1e-8),
                start,
                b,
                adjoint=adjoint,
                monitor=monitor,
                throw=False,
            ).value

        b = jnp.ones(60)
        _, pull = jax.vjp(solve, b, eqlx.AdjointMonitor())
        grad, seen = pull(ct)
        forward = jax.jvp(lambda b: solve(b, None), (b,), (ct,))[1]
        return grad, float(seen.num_steps), forward

    ct = jr.normal(getkey(), (60,))
    transposed = np.linalg.solve(np.asarray(matrix).T, ct)
    straight = np.linalg.solve(np.asarray(matrix), ct)
    grad, plain, forward = run(None, ct)
    for fn, most in (
        (lambda v, y, b: v / diagonal, 0.5),
        (lambda v, y, b: jnp.linalg.solve(upper, v), 0.5),
    ):
        grad, steps, forward = run(fn, ct)
        assert relative_error(grad, transposed) < 1e-6
        assert relative_error(forward, straight) < 1e-6
        assert steps < most * plain
    # The preconditioner that is the inverse: one step, if it is transposed.
    grad, steps, _ = run(lambda v, y, b: jnp.linalg.solve(matrix, v), ct)
    assert steps == 1


@pytest.mark.parametrize(
    "solver",
    [
        eqlx.KrylovLinearSolver(1e-12),
        eqlx.FixedPointLinearSolver(eqlx.Anderson(0.0, 1e-12)),
    ],
)
def test_the_options_of_lineax_are_heeded(getkey, solver):
    diagonal, matrix = _scaled_problem(getkey, n=20)
    inverse = lx.DiagonalLinearOperator(1 / diagonal)
    v = jr.normal(getkey(), (20,))
    options = {"preconditioner": inverse}
    sol = _solve(matrix, v, solver, options=options)
    assert relative_error(sol.value, np.linalg.solve(matrix, v)) < 1e-9
    operator = lx.MatrixLinearOperator(matrix)
    grad = jax.grad(
        lambda v: lx.linear_solve(operator, v, solver, options=options).value[3]
    )(v)
    unit = np.eye(20)[3]
    assert relative_error(grad, np.linalg.solve(np.asarray(matrix).T, unit)) < 1e-9
    start = _solve(matrix, v, type(solver)(), options=options | {"y0": sol.value})
    assert start.stats["num_steps"] <= 1
    assert relative_error(start.value, np.linalg.solve(matrix, v)) < 1e-9
    with pytest.raises(ValueError, match=r"`options`.*got \['max_rank'\]"):
        _solve(matrix, v, solver, options={"max_rank": 3})


def test_a_preconditioner_closes_over_anything(getkey):
    def solve(a, scale):
        fn = lambda z, a: jnp.cos(a * z)
        near = lambda v, y, a: v * scale
        adjoint = eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver(1e-12), near)
        start = jnp.full((2,), 0.5)
        return eqlx.fixed_point(
            fn, eqlx.Anderson(0.0, 1e-12), start, a, adjoint=adjoint
        ).value.sum()

    a = jnp.array(1.0)
    z = newton(lambda z, a: jnp.cos(a * z), jnp.full((1,), 0.5), a)
    dense = dense_sensitivity(lambda z, a: jnp.cos(a * z), z, a)
    run = jax.jit(jax.vmap(jax.grad(solve), (None, 0)))
    got = run(a, jnp.array([0.5, 0.7]))
    assert relative_error(got, 2 * jnp.stack([dense[0], dense[0]])) < 1e-9
