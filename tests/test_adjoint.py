"""Derivatives against dense inverses in float64, closed forms and unrolled loops.

`tests/test_matrix.py` has every adjoint under every transform.
"""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from .helpers import (
    Counted,
    dense_sensitivity,
    newton,
    optimised_hlo,
    relative_error,
    tanh_cell,
    tanh_problem,
)


def _exact(tol):
    return {
        "default": eqlx.ImplicitAdjoint(),
        "picard": eqlx.ImplicitAdjoint(
            eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, tol))
        ),
        "lu": eqlx.ImplicitAdjoint(lx.LU()),
        "gmres": eqlx.ImplicitAdjoint(lx.GMRES(rtol=tol, atol=tol)),
    }


_precisions = {
    "float64": (jnp.float64, 1e-12, 1e-10),
    "float32": (jnp.float32, 1e-6, 1e-5),
}
exact = pytest.mark.parametrize("name", list(_exact(1e-3)))
precisions = pytest.mark.parametrize(
    ("dtype", "tol", "bound"), _precisions.values(), ids=list(_precisions)
)


def _case(getkey, dtype, tol, adjoint, solver=None, size=7):
    args = tanh_problem(getkey(), size, 0.8, dtype)
    z = newton(tanh_cell, jnp.zeros(size), args)
    solver = eqlx.Anderson(0.0, tol) if solver is None else solver

    def solve(args):
        start = jnp.zeros(size, dtype)
        return eqlx.fixed_point(tanh_cell, solver, start, args, adjoint=adjoint).value

    return solve, args, dense_sensitivity(tanh_cell, z, args)


_cos = lambda y, a: jnp.cos(a * y)
# z(1), and its first and second derivative in `a`.
_cos_value, _cos_first, _cos_second = 0.7390851332151607, -0.2974743, 0.1533379


def test_third_order():
    solver = eqlx.Anderson(0.0, 1e-13)
    solve = lambda a: eqlx.fixed_point(_cos, solver, jnp.array(0.5), a).value
    a, h = jnp.array(1.0), 1e-5
    hessian = jax.jit(jax.hessian(solve))
    by_difference = (hessian(a + h) - hessian(a - h)) / (2 * h)
    third = jax.jit(jax.grad(jax.jacfwd(jax.grad(solve))))(a)
    assert jnp.allclose(third, by_difference, rtol=1e-5)


@exact
def test_the_derivative_is_linear_and_transposable(getkey, name):
    solve, args, dense = _case(getkey, jnp.float64, 1e-12, _exact(1e-12)[name])
    x = args[1]
    _, linear = jax.linearize(lambda x: solve((args[0], x)), x)
    t, ct = jr.normal(getkey(), x.shape), jr.normal(getkey(), x.shape)
    assert relative_error(linear(t), dense[1] @ t) < 1e-10
    (back,) = jax.linear_transpose(linear, x)(ct)
    assert relative_error(back, dense[1].T @ ct) < 1e-10


def test_a_missing_transpose_or_sign_would_show():
    a = jnp.array([[0.5, 0.4], [-0.2, 0.3]])
    b, c = jnp.array([1.0, 2.0]), jnp.array([1.0, -3.0])

    def loss(a, b):
        solver = eqlx.Anderson(0.0, 1e-12)
        fn = lambda y, p: p[0] @ y + p[1]
        return c @ eqlx.fixed_point(fn, solver, jnp.zeros(2), (a, b)).value

    g_a, g_b = jax.grad(loss, (0, 1))(a, b)
    adjoint = np.linalg.solve(np.eye(2) - np.asarray(a).T, c)
    z = np.linalg.solve(np.eye(2) - np.asarray(a), b)
    assert jnp.allclose(g_b, adjoint)
    assert jnp.allclose(g_a, np.outer(adjoint, z))


def test_derivatives_reach_what_fn_closes_over():
    solver = eqlx.Anderson(0.0, 1e-12)
    solve = lambda a: (
        eqlx.fixed_point(lambda y, _: jnp.cos(a * y), solver, jnp.array(0.5)).value
    )
    a = jnp.array(1.0)
    assert jnp.allclose(jax.grad(solve)(a), _cos_first, atol=1e-7)
    assert jnp.allclose(jax.jit(jax.grad(solve))(a), _cos_first, atol=1e-7)
    assert jnp.allclose(jax.jvp(solve, (a,), (a,))[1], _cos_first, atol=1e-7)
    assert jnp.allclose(jax.hessian(solve)(a), _cos_second, atol=1e-7)
    batch = jax.vmap(jax.grad(solve))(jnp.array([0.5, 1.0]))
    assert jnp.allclose(batch, jnp.array([-0.3217709, _cos_first]), atol=1e-7)


def test_the_start_has_no_derivative(getkey):
    solver = eqlx.Anderson(0.0, 1e-10)
    args = tanh_problem(getkey(), 4, 0.5)
    solve = lambda z0: eqlx.fixed_point(tanh_cell, solver, z0, args).value
    assert jnp.all(jax.grad(lambda z0: solve(z0).sum())(jnp.ones(4)) == 0)
    assert jnp.all(jax.jacfwd(solve)(jnp.ones(4)) == 0)
    both = jax.grad(lambda z0: solve(z0).sum() + z0.sum())(jnp.ones(4))
    assert jnp.all(both == 1)


@pytest.mark.parametrize("max_steps", [1, 2, 50])
def test_the_gradient_is_there_however_few_steps_were_taken(max_steps):
    def solve(c):
        solver = eqlx.FixedPointIteration(1e-6, 1e-6)
        fn = lambda y, c: 0.5 * y + c
        start = jnp.array(2.0)
        return eqlx.fixed_point(fn, solver, start, c, max_steps=max_steps).value

    assert jnp.allclose(jax.grad(solve)(1.0), 2.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
@precisions
def test_a_scaled_cotangent_scales_the_gradient(getkey, scale, dtype, tol, bound):
    solve, args, dense = _case(getkey, dtype, tol, eqlx.ImplicitAdjoint())
    _, vjp = jax.vjp(lambda x: solve((args[0], x)), args[1])
    ct = jr.normal(getkey(), args[1].shape, jnp.float64)
    (got,) = vjp((scale * ct).astype(dtype))
    expected = dense[1].T @ ct
    assert relative_error(got.astype(jnp.float64) / scale, expected) < bound


def test_a_zero_cotangent_gives_zero(getkey):
    solve, args, _ = _case(getkey, jnp.float64, 1e-10, eqlx.ImplicitAdjoint())
    _, vjp = jax.vjp(solve, args)
    (got,) = vjp(jnp.zeros(7))
    assert all(jnp.all(x == 0) for x in got)


def test_gradients_flow_through_aux(getkey):
    a = jnp.array(0.5)

    def loss(a):
        fn = lambda y, a: (a * y + 1, {"twice": 2 * a * y, "name": "aux"})
        solver = eqlx.Anderson(0.0, 1e-12)
        sol = eqlx.fixed_point(fn, solver, jnp.array(0.0), a, has_aux=True)
        assert sol.aux["name"] == "aux"
        return sol.aux["twice"]

    # y = 1 / (1 - a), so the aux is 2 a / (1 - a) with derivative 2 / (1 - a)^2.
    assert jnp.allclose(loss(a), 2.0)
    assert jnp.allclose(jax.grad(loss)(a), 8.0)
    assert jnp.allclose(jax.jacfwd(loss)(a), 8.0)


def test_statistics_have_a_zero_derivative():
    def loss(c):
        solver = eqlx.Anderson(1e-6, 1e-6)
        sol = eqlx.fixed_point(lambda y, c: 0.5 * y + c, solver, jnp.full(3, 2.0), c)
        return sol.value.sum() + jnp.sqrt(sol.stats["residual"] ** 2)

    assert jnp.allclose(jax.grad(lambda c: loss(c) + 0.0)(jnp.ones(3) * 0.7), 2.0)


@pytest.mark.parametrize("name", ["default", "lu"])
def test_complex_gradients_follow_the_convention_of_jax(name):
    q = jnp.array([[0.1 + 0.2j, 0.5], [0.0, 0.3j]])
    b, c = jnp.array([1 + 1j, 2.0 + 0j]), jnp.array([1.0, 1j])

    def loss(solve):
        return lambda q, b: jnp.real(jnp.vdot(c, solve(q, b)))

    def ours(q, b):
        solver = eqlx.Anderson(0.0, 1e-12)
        fn = lambda y, p: p[0] @ y + p[1]
        adjoint = _exact(1e-12)[name]
        return eqlx.fixed_point(fn, solver, 0 * b, (q, b), adjoint=adjoint).value

    dense = lambda q, b: jnp.linalg.solve(jnp.eye(2, dtype=q.dtype) - q, b)
    got = jax.grad(loss(ours), (0, 1))(q, b)
    assert relative_error(got, jax.grad(loss(dense), (0, 1))(q, b)) < 1e-10


def test_a_function_that_is_not_holomorphic():
    # z = a conj(z) + b has the solution (b + a conj(b)) / (1 - |a|^2).
    a, b = jnp.array(0.4 + 0.3j), jnp.array(1.0 - 2.0j)

    def ours(a, b):
        fn = lambda y, p: p[0] * jnp.conj(y) + p[1]
        return eqlx.fixed_point(fn, eqlx.Anderson(0.0, 1e-12), 0 * b, (a, b)).value

    closed = lambda a, b: (b + a * jnp.conj(b)) / (1 - jnp.abs(a) ** 2)
    loss = lambda f: lambda a, b: jnp.abs(f(a, b) - 1) ** 2
    assert jnp.allclose(ours(a, b), closed(a, b))
    got = jax.grad(loss(ours), (0, 1))(a, b)
    assert relative_error(got, jax.grad(loss(closed), (0, 1))(a, b)) < 1e-10


def test_args_may_hold_anything():
    args = dict(
        a=jnp.array(1.0),
        k=jnp.array(2),
        mask=jnp.array([True]),
        none=None,
        name="cos",
        nested=[None, jnp.array(1.0)],
        key=jr.key(0),
    )

    def fn(y, p):
        factor = jnp.where(p["k"] > 1, 1.0, 2.0)
        return jnp.cos(p["a"] * y) * factor * p["nested"][1]

    solver = eqlx.Anderson(0.0, 1e-12)
    solve = lambda a: eqlx.fixed_point(fn, solver, jnp.array(0.5), {**args, "a": a})
    got = jax.grad(lambda a: solve(a).value)(args["a"])
    assert jnp.allclose(got, _cos_first, atol=1e-7)
    arrays = {k: v for k, v in args.items() if k != "name" and k != "key"}
    of_tree = lambda p: eqlx.fixed_point(fn, solver, jnp.array(0.5), p).value
    got = jax.grad(of_tree, allow_int=True)(arrays)
    assert got["k"].dtype == jax.dtypes.float0
    assert jnp.allclose(got["a"], _cos_first, atol=1e-7)


@pytest.mark.parametrize("name", ["default", "lu"])
def test_a_singular_adjoint_is_never_silent(name):
    adjoint = _exact(1e-8)[name]

    def solve(c, throw):
        fn = lambda y, c: jnp.array([1.0, 0.5]) * y + jnp.array([0.0, 1.0]) * c
        solver = eqlx.FixedPointIteration(1e-8, 1e-8)
        return eqlx.fixed_point(
            fn, solver, jnp.zeros(2), c, adjoint=adjoint, throw=throw
        ).value.sum()

    assert jnp.allclose(solve(1.0, False), 2.0)
    assert not jnp.isfinite(jax.grad(solve)(1.0, False))
    with pytest.raises(Exception, match="linear solve of a derivative failed"):
        jax.block_until_ready(jax.grad(solve)(1.0, True))


def test_fn_is_traced_once_and_not_again(getkey):
    w, x = tanh_problem(getkey(), 5, 0.8)
    counted = Counted(tanh_cell)
    solver = eqlx.Anderson(0.0, 1e-8)
    solve = lambda w, x: eqlx.fixed_point(
        counted, solver, jnp.zeros(5), (w, x), throw=False
    ).value.sum()
    eqlx.fixed_point(counted, solver, jnp.zeros(5), (w, x))
    assert len(counted.traces) == 1
    for _ in range(3):
        eqlx.fixed_point(counted, solver, jnp.zeros(5), (2 * w / 3, x))
    assert len(counted.traces) == 1

    counted.traces.clear()
    batch = jax.jit(jax.grad(lambda w, xs: jax.vmap(solve, (None, 0))(w, xs).sum()))
    for k in range(3):
        batch(w, jnp.stack([x, x + k, x]))
    assert len(counted.traces) == 1


def test_the_map_is_linearised_once_outside_the_backward_loop(getkey):
    args = tanh_problem(getkey(), 5, 0.8)

    def loss(args):
        solver = eqlx.Anderson(0.0, 1e-8)
        fn = lambda y, p: jnp.tanh(p[0] @ y + p[1])
        return eqlx.fixed_point(fn, solver, jnp.zeros(5), args, throw=False).value.sum()

    text = optimised_hlo(jax.grad(loss), args)
    # One in the forward loop and at most two at the solution: none in the adjoint's.
    assert 1 <= text.count(" tanh(") <= 3


def test_memory_does_not_depend_on_the_steps(getkey):
    n = 512
    w, x = tanh_problem(getkey(), n, 0.8, jnp.float32)

    def temporary(max_steps, adjoint):
        def loss(w):
            solver = eqlx.FixedPointIteration(0.0, 1e-6)
            start = jnp.zeros(n, jnp.float32)
            return eqlx.fixed_point(
                tanh_cell,
                solver,
                start,
                (w, x),
                max_steps=max_steps,
                adjoint=adjoint,
                throw=False,
            ).value.sum()

        compiled = jax.jit(jax.grad(loss)).lower(w).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    implicit = [temporary(k, eqlx.ImplicitAdjoint()) for k in (10, 1000)]
    assert implicit[0] == implicit[1]
    assert implicit[0] < n * n * 4 / 2  # No dense Jacobian anywhere.
    unrolled = [temporary(k, eqlx.RecursiveCheckpointAdjoint()) for k in (10, 1000)]
    assert unrolled[1] < 20 * unrolled[0]


def test_the_best_iterate_of_a_failed_solve_has_the_derivative_there():
    fn = lambda y, a: 0.5 * jnp.sin(y) + a

    def solve(a):
        solver = eqlx.BestSoFar(eqlx.FixedPointIteration(1e-9, 1e-9))
        sol = eqlx.fixed_point(fn, solver, jnp.zeros(()), a, max_steps=4, throw=False)
        assert sol.aux is None
        return sol.value

    value, grad = jax.jit(jax.value_and_grad(solve))(1.0)
    assert np.allclose(grad, 1 / (1 - 0.5 * np.cos(value)), rtol=1e-6)
