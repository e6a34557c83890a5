"""What is special to the solvers that extrapolate without a history."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np
import pytest


solvers = pytest.mark.parametrize("solver", [eqlx.Aitken, eqlx.Squarem])


def test_aitken_is_exact_on_affine_elements_after_one_step():
    rates = jnp.array([0.5, -3.0, 0.999, 0.0, 1.7])
    sol = eqlx.fixed_point(
        lambda y, c: c * y + 1, eqlx.Aitken(0.0, 1e-9), jnp.zeros(5), rates
    )
    assert sol.stats["num_steps"] == 1
    # Evaluated at the start, within the step, and at the end.
    assert sol.stats["num_fn_evals"] == 3
    assert np.allclose(sol.value, 1 / (1 - rates), rtol=1e-9)


def test_aitken_converges_quadratically():
    errors = []
    for max_steps in (1, 2, 3):
        sol = eqlx.fixed_point(
            lambda y, _: jnp.cos(y),
            eqlx.Aitken(0.0, 0.0),
            jnp.array(1.0),
            max_steps=max_steps,
        )
        errors.append(abs(float(sol.value) - 0.7390851332151607))
    assert errors[1] < errors[0] ** 2
    assert errors[2] < max(errors[1] ** 2, 1e-15)


def test_squarem_is_its_formula():
    a = jnp.array([[0.5, 0.2], [0.1, 0.9]])
    b = jnp.array([1.0, -1.0])
    sol = eqlx.fixed_point(
        lambda y, _: a @ y + b, eqlx.Squarem(0.0, 0.0), jnp.zeros(2), max_steps=1
    )
    fn = lambda y: np.asarray(a) @ y + np.asarray(b)
    y0 = np.zeros(2)
    r, v = fn(y0) - y0, fn(fn(y0)) - 2 * fn(y0) + y0
    alpha = -max(1, np.linalg.norm(r) / np.linalg.norm(v))
    expected = fn(y0 - 2 * alpha * r + alpha**2 * v)
    assert np.allclose(sol.value, expected, rtol=1e-14)
    assert sol.stats["num_fn_evals"] == 4


def test_squarem_saves_evaluations_on_a_slow_monotone_map():
    rates = jnp.linspace(0.0, 0.99, 8)
    solve = lambda solver: eqlx.fixed_point(
        lambda y, _: rates * y + 1, solver, jnp.zeros(8), max_steps=5000
    )
    squared = solve(eqlx.Squarem(0.0, 1e-8))
    plain = solve(eqlx.FixedPointIteration(0.0, 1e-8))
    assert 2 * squared.stats["num_fn_evals"] < plain.stats["num_fn_evals"]
    expected = 1 / (1 - np.linspace(0, 0.99, 8))
    assert np.max(np.abs(squared.value - expected)) < 1e-8 * 100


@solvers
def test_a_map_that_does_not_move_further_divides_by_no_zero(solver):
    # After one step all is at rest: both differences vanish in the second element.
    fn = lambda y, _: jnp.array([0.5, 0.0]) * y + jnp.array([1.0, 3.0])
    sol = eqlx.fixed_point(fn, solver(0.0, 1e-10), jnp.zeros(2))
    assert np.allclose(sol.value, [2, 3], atol=1e-9)


@solvers
def test_what_turns_nonfinite_within_a_step_is_told(solver):
    # From 1.5 to 4, and there the map, called once more by the step, is not finite.
    fn = lambda y, _: jnp.where(y > 2, jnp.nan, 2 * y + 1)
    sol = eqlx.fixed_point(fn, solver(0.0, 1e-9), jnp.full(3, 1.5), throw=False)
    assert sol.result == eqlx.RESULTS.nonfinite
    assert np.allclose(sol.value, 4)
    assert sol.stats["num_steps"] == 1


@solvers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_dtypes(solver, dtype):
    tol = 8 * float(jnp.finfo(dtype).eps)
    sol = eqlx.fixed_point(
        lambda y, _: (0.5 * y + 1).astype(y.dtype),
        solver(tol, tol),
        jnp.zeros(3, dtype),
    )
    assert sol.value.dtype == dtype
    assert np.max(np.abs(np.asarray(sol.value, complex) - 2)) < 8 * tol


@solvers
def test_a_batch_and_its_gradient(solver):
    rates = jnp.linspace(0.1, 0.9, 11)

    def solve(c):
        fn = lambda y, c: c * y + 1
        return eqlx.fixed_point(fn, solver(0.0, 1e-11), jnp.zeros(()), c, throw=False)

    sol = jax.jit(jax.vmap(solve))(rates)
    assert np.allclose(sol.value, 1 / (1 - rates), rtol=1e-9)
    grad = jax.jit(jax.grad(lambda c: jnp.sum(jax.vmap(solve)(c).value)))(rates)
    assert np.allclose(grad, 1 / (1 - rates) ** 2, rtol=1e-8)


@solvers
def test_an_fn_of_the_whole_batch_is_refused(solver):
    with pytest.raises(ValueError, match=f"`solver={solver.__name__}`.*`batch_axis`"):
        eqlx.fixed_point(
            lambda y, _: 0.5 * y, solver(0.0, 1e-6), jnp.zeros((3, 2)), batch_axis=0
        )
