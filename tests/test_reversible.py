"""The reversible iteration: where it converges, and the way back."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import is_successful, tanh_cell, tanh_problem


def _steps(solver, fn, y0, args, num, **kwargs):
    return eqlx.fixed_point(fn, solver, y0, args, max_steps=num, **kwargs)


def _paper(fn, y, beta, num):
    """The iterates of the scheme for a pair, in the order of their evaluation."""
    p = q = y
    iterates = [y]
    for _ in range(num):
        p = (1 - beta) * p + beta * fn(q)
        q = (1 - beta) * q + beta * fn(p)
        iterates += [p, q]
    return iterates


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_iterates_are_those_of_the_scheme_for_a_pair(getkey, beta):
    w, x = tanh_problem(getkey(), 6, 0.9)
    start = jr.normal(getkey(), (6,))
    fn = lambda y: np.tanh(np.asarray(w) @ y + np.asarray(x))
    expected = _paper(fn, np.asarray(start), beta, 5)
    for num in (1, 2, 3, 4, 9, 10):
        sol = _steps(
            eqlx.Reversible(0.0, 0.0, beta=beta), tanh_cell, start, (w, x), num
        )
        assert np.max(np.abs(sol.value - expected[num])) < 1e-14
        assert np.max(np.abs(sol.state.previous - expected[num - 1])) < 1e-14
        assert sol.stats["num_fn_evals"] == num + 1


def _rotation(x, y):
    """A map of the plane with the eigenvalues `x + iy` and `x - iy`."""
    return lambda z, _: jnp.array([[x, -y], [y, x]]) @ z


@pytest.mark.parametrize("beta", [0.3, 0.8])
@pytest.mark.parametrize("angle", np.linspace(0, np.pi, 7))
def test_the_ellipse_is_where_it_converges(beta, angle):
    # Two percent within it, and two percent outside.
    x, y = np.cos(angle), np.sin(angle) * (2 - beta) / beta
    errors = []
    for size in (0.98, 1.02):
        fn = _rotation(size * x, size * y)
        sol = _steps(eqlx.Reversible(0.0, 0.0, beta=beta), fn, jnp.ones(2), None, 2000)
        errors.append(float(jnp.max(jnp.abs(sol.value))))
        # The rate is the larger root.
        roots = np.roots([1, -beta * size * (x + 1j * y), beta - 1])
        assert (np.max(np.abs(roots)) < 1) == (size < 1)
    assert errors[0] < 1e-2
    assert errors[1] > 1e2


def test_the_error_falls_as_the_larger_root_of_the_recurrence():
    beta, rate = 0.8, 0.9
    root = (beta * rate + np.sqrt((beta * rate) ** 2 + 4 * (1 - beta))) / 2
    solver = eqlx.Reversible(0.0, 0.0, beta=beta)
    sizes = [
        float(_steps(solver, lambda y, _: rate * y, jnp.ones(()), None, num).value)
        for num in (40, 60)
    ]
    assert np.isclose(sizes[1] / sizes[0], root**20, rtol=1e-6)


def _back(solver, fn, sol, num):
    """Where the last two iterates came from, `num` steps earlier."""
    new, y = sol.value, sol.state.previous
    for _ in range(num):
        new, y = y, solver.reverse(fn(y), new)
    return new, y


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_the_way_back_ends_where_it_began(getkey, beta):
    args = tanh_problem(getkey(), 6, 0.9)
    start = jr.normal(getkey(), (6,))
    solver = eqlx.Reversible(0.0, 0.0, beta=beta)
    eps = float(jnp.finfo(jnp.float64).eps)
    for num in (2, 5, 10):
        sol = _steps(solver, tanh_cell, start, args, num)
        first, before = _back(solver, lambda y: tanh_cell(y, args), sol, num)
        # The last of the reversed steps leads to the one that is said to be before.
        bound = 20 * eps * (1 - beta) ** -num
        assert np.max(np.abs(first - start)) < bound
        assert np.max(np.abs(before - start)) < bound / (1 - beta)
        # And it did move.
        assert np.max(np.abs(sol.value - start)) > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_a_step_undone_in_the_precision_of_the_dtype(getkey, dtype):
    beta = 0.8
    solver = eqlx.Reversible(0.0, 0.0, beta=beta)
    start = jr.uniform(getkey(), (100,), jnp.float64, -1, 1).astype(dtype)
    sol = _steps(solver, lambda y, _: jnp.cos(y), start, None, 3)
    y, before = _back(solver, jnp.cos, sol, 3)
    # Roundings of numbers below one, grown by three steps undone.
    eps = float(jnp.finfo(dtype).eps)
    size = np.max(np.abs(np.asarray(y - start, np.float64)))
    assert size < eps * (1 - beta) ** -3
    assert y.dtype == before.dtype == dtype


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_errors_on_the_way_back_grow_as_the_smaller_root(rate):
    # The map is linear, with the solution zero: an error obeys the recurrence itself.
    beta = 0.8
    solver = eqlx.Reversible(0.0, 0.0, beta=beta)
    root = min(np.abs(np.roots([1, -beta * rate, beta - 1])))
    new = y = jnp.array(1e-10)
    sizes = []
    for _ in range(30):
        new, y = y, solver.reverse(rate * y, new)
        sizes.append(abs(float(y)))
    # Over two steps, as the two roots of the eigenvalue zero are of one size.
    growth = (sizes[-1] / sizes[-3]) ** 0.5
    assert np.isclose(growth, 1 / root, rtol=1e-6)
    assert growth <= 1 / (1 - beta)


def test_a_solve_goes_on_from_its_state_as_if_it_had_not_stopped(getkey):
    args = tanh_problem(getkey(), 6, 0.9)
    solver = eqlx.Reversible(0.0, 0.0)
    whole = _steps(solver, tanh_cell, jnp.ones(6), args, 9)
    half = _steps(solver, tanh_cell, jnp.ones(6), args, 4)
    rest = _steps(solver, tanh_cell, half.value, args, 5, state=half.state)
    assert np.array_equal(rest.value, whole.value)
    assert np.array_equal(rest.state.previous, whole.state.previous)
    # One that has converged goes on too.
    loose, tight = eqlx.Reversible(0.0, 1e-3), eqlx.Reversible(0.0, 1e-9)
    once = _steps(tight, tanh_cell, jnp.ones(6), args, 400)
    half = _steps(loose, tanh_cell, jnp.ones(6), args, 400)
    rest = _steps(tight, tanh_cell, half.value, args, 400, state=half.state)
    num = half.stats["num_steps"] + rest.stats["num_steps"]
    assert half.stats["num_steps"] > 3
    assert num == once.stats["num_steps"]
    assert np.array_equal(rest.value, once.value)


def test_a_solve_that_failed_leaves_a_state_at_rest():
    # It diverges to 1e8; what is returned is the start, and so is what it came from.
    fn = lambda y, rate: rate * y + 1
    solver = eqlx.Reversible(0.0, 1e-9)
    bad = _steps(solver, fn, jnp.zeros(()), 3.0, 100, throw=False)
    assert bad.result == eqlx.RESULTS.divergence
    assert bad.value == bad.state.previous == 0
    sol = _steps(solver, fn, bad.value, 0.5, 100, state=bad.state)
    cold = _steps(solver, fn, jnp.zeros(()), 0.5, 100)
    assert sol.stats["num_steps"] == cold.stats["num_steps"]
    assert np.isclose(sol.value, 2)


@pytest.mark.parametrize("batching", [eqlx.Staged(), eqlx.Lockstep(), eqlx.Vmapped()])
def test_the_state_of_a_finished_sample_is_kept(batching):
    def solve(rate):
        fn = lambda y, _: rate * y + 1
        return eqlx.fixed_point(
            fn,
            eqlx.Reversible(0.0, 1e-9),
            jnp.zeros(()),
            max_steps=600,
            batching=batching,
        )

    rates = jnp.full(9, 0.1).at[4].set(0.9)
    sol = jax.jit(jax.vmap(solve))(rates)
    assert jnp.all(is_successful(sol))
    alone = [solve(rate) for rate in rates]
    # Compilers round differently.
    expected = np.array([[s.value, s.state.previous] for s in alone])
    got = np.stack([sol.value, sol.state.previous], axis=1)
    assert np.allclose(got, expected, rtol=1e-14)


def test_a_batch_in_one_call_and_its_gradient():
    rates = jnp.linspace(-0.9, 0.9, 5)

    def solve(rates):
        return eqlx.fixed_point(
            lambda y, c: c * y + 1,
            eqlx.Reversible(0.0, 1e-12),
            jnp.zeros(5),
            rates,
            batch_axis=0,
            max_steps=600,
        ).value

    assert np.allclose(solve(rates), 1 / (1 - rates), rtol=1e-10)
    grad = jax.grad(lambda c: jnp.sum(solve(c)))(rates)
    assert np.allclose(grad, 1 / (1 - rates) ** 2, rtol=1e-8)


def test_keeps_the_dtype_of_every_leaf():
    y0 = {"low": jnp.zeros(2, jnp.bfloat16), "complex": jnp.zeros((), jnp.complex64)}
    fn = lambda y, _: {"low": y["low"] / 2 + 1, "complex": 0.5j * y["complex"] + 1}
    solver = eqlx.Reversible(1e-2, 1e-2)
    sol = _steps(solver, fn, y0, None, 100)
    for tree in (sol.value, sol.state.previous, solver.reverse(y0, sol.value)):
        assert jax.tree.map(lambda x: x.dtype, tree) == {
            "low": jnp.bfloat16,
            "complex": jnp.complex64,
        }
    assert np.allclose(np.asarray(sol.value["low"], float), 2, rtol=0.03)
    assert np.allclose(sol.value["complex"], 1 / (1 - 0.5j), rtol=0.03)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_weight_outside_of_its_range_is_refused(beta):
    with pytest.raises(ValueError, match=r"`beta` must be in"):
        eqlx.Reversible(0.0, 1e-3, beta=beta)
