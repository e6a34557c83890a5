"""Dtypes, precision and scales, of the kinds that `tests/README.md` lists."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from .helpers import is_successful, newton, relative_error, tanh_cell, tanh_problem


_single = jnp.float32


def _lean(rtol, atol):
    solver = eqlx.FixedPointIteration(rtol, atol)
    return eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))


@pytest.mark.parametrize(
    "tol", [1e-5, np.float64(1e-5), np.float32(1e-5), jnp.array(1e-5, jnp.bfloat16)]
)
@pytest.mark.parametrize("is_double", [True, False])
def test_neither_float64_nor_a_tolerance_changes_a_dtype(tol, is_double):
    with jax.enable_x64(is_double):

        def loss(c):
            sol = eqlx.fixed_point(
                lambda y, c: 0.5 * y + c,
                eqlx.FixedPointIteration(tol, tol),
                jnp.zeros(2, _single),
                c,
                adjoint=_lean(1e-6, 0.0),
                throw=False,
            )
            return jnp.sum(sol.value), sol

        (_, sol), grad = jax.value_and_grad(loss, has_aux=True)(jnp.ones(2, _single))
        assert sol.value.dtype == grad.dtype == _single
        assert sol.stats["residual"].dtype == _single
        assert sol.stats["num_steps"].dtype == jnp.int32
        assert np.allclose(sol.value, 2, rtol=1e-4)
        assert np.allclose(grad, 2, rtol=1e-5)


@pytest.mark.parametrize(
    "start",
    [
        0.0,
        np.float64(0),
        np.float32(0),
        np.zeros(2),
        np.zeros(2, np.float16),
        [0.0] * 2,
    ],
    ids=["python", "float64", "float32", "array", "half", "list"],
)
def test_a_start_of_python_or_numpy_is_an_array_of_floats(start):
    fn = lambda y, _: jax.tree.map(lambda y: 0.5 * y + 1, y)
    solver = eqlx.FixedPointIteration(1e-3, 1e-3)
    value = eqlx.fixed_point(fn, solver, start).value
    assert jax.tree.structure(value) == jax.tree.structure(start)
    for leaf, before in zip(
        jax.tree.leaves(value), jax.tree.leaves(start), strict=True
    ):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.result_type(before)
        assert np.allclose(leaf, 2, rtol=5e-3)


_transforms = {
    "plain": lambda f: f,
    "vmap": lambda f: lambda y, c: jax.vmap(f)(y[None], c[None]),
    "grad": lambda f: jax.grad(lambda y, c: jnp.sum(f(y, c)), 1),
    "jvp": lambda f: lambda y, c: jax.jvp(lambda c: f(y, c), (c,), (c,)),
}


@pytest.mark.parametrize("transform", _transforms.values(), ids=list(_transforms))
def test_parameters_that_promote_the_state_are_told_with_both_dtypes(transform):
    def solve(y, c):
        solver = eqlx.FixedPointIteration(1e-2, 1e-2)
        return eqlx.fixed_point(lambda y, c: c * y + 1, solver, y, c).value

    match = r"`fn` must return .* of `y0`; got float32\[2\], expected bfloat16\[2\]"
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=match):
        transform(solve)(jnp.zeros(2, jnp.bfloat16), jnp.full(2, 0.5, _single))


def test_an_absolute_tolerance_has_the_units_of_the_state():
    # The answers are 1e7 and 1e-5: an `atol` above the second is met where it starts.
    fn = lambda y, _: (0.9 * y[0] + 1e6, 0.9 * y[1] + 1e-6)
    start = (jnp.zeros(()), jnp.zeros(()))
    run = lambda solver: eqlx.fixed_point(fn, solver, start)
    coarse = run(eqlx.FixedPointIteration(0.0, 1e-4))
    assert np.isclose(coarse.value[0], 1e7)
    small = eqlx.fixed_point(
        lambda y, _: 0.9 * y + 1e-6, eqlx.FixedPointIteration(0.0, 1e-4), start[1]
    )
    assert small.value == 0
    assert small.stats["num_steps"] == 0
    # A norm says in which unit each leaf is, a relative tolerance needs none.
    by_unit = lambda d: eqlx.max_norm((1e-7 * d[0], 1e5 * d[1]))
    for solver in (
        eqlx.FixedPointIteration(0.0, 1e-4, by_unit),
        eqlx.FixedPointIteration(1e-4, 0.0),
    ):
        sol = run(solver)
        assert np.isclose(sol.value[0], 1e7, rtol=2e-3)
        assert np.isclose(sol.value[1], 1e-5, rtol=2e-3)


@pytest.mark.parametrize("solver", [eqlx.Squarem, eqlx.Aitken])
def test_extrapolation_next_to_the_solution_makes_no_excursion(solver):
    # A step length is a ratio of differences, all of which are rounding there.
    rates = jnp.array([0.99, 0.5], _single)
    solution = jnp.array([100.0, 2.0], _single)
    fn = lambda y, c: rates * y + c
    traced = eqlx.Traced(solver(1e-6, 1e-6))
    for start in (solution * _single(1 + 1e-6), 0 * solution):
        sol = eqlx.fixed_point(fn, traced, start, jnp.ones(2, _single), max_steps=2000)
        assert np.allclose(sol.value, [100, 2], rtol=1e-3)
        trace = np.asarray(sol.stats["trace"])
        seen = trace[np.isfinite(trace)]
        first = float(np.max(np.abs(fn(start, jnp.ones(2, _single)) - start)))
        assert np.max(seen) <= max(8 * first, 2e-4)


@pytest.mark.parametrize(
    "solver", [eqlx.Broyden, eqlx.BadBroyden, eqlx.AndersonTypeI, eqlx.Anderson]
)
def test_updates_by_differences_that_vanish_stay_finite_in_float32(getkey, solver):
    # With no tolerance it goes on where all differences are rounding.
    w, x = tanh_problem(getkey(), 30, 0.95, _single)
    start = jnp.zeros(30, _single)
    run = lambda x: eqlx.fixed_point(
        tanh_cell, solver(0.0, 0.0), start, (w, x), max_steps=150, throw=False
    )
    sols = jax.jit(jax.vmap(run))(jnp.stack([x, 0 * x, 3 * x]))
    assert np.all(is_successful(sols))
    for value, factor in zip(sols.value, (1, 0, 3), strict=True):
        expected = newton(tanh_cell, start, (w, factor * x))
        # Rounding, times 1 / (1 - 0.95), in 30 terms.
        error = np.max(np.abs(np.asarray(value, np.float64) - expected))
        assert error < 30 * 20 * np.finfo(np.float32).eps


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 0.0])
def test_a_nearly_singular_adjoint_is_as_good_as_its_condition_allows(gap):
    # An eigenvalue of the Jacobian `gap` below one. At one there is no derivative.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    a = jnp.asarray(turn @ np.diag([1 - gap, 0.5]) @ turn.T, _single)
    a = a if gap > 0 else jnp.diag(jnp.array([1, 0.5], _single))
    c = jnp.asarray(turn @ np.array([0.0, 1.0]), _single)
    c = c if gap > 0 else jnp.array([0, 1], _single)

    def loss(c):
        solver = eqlx.FixedPointIteration(1e-6, 1e-6)
        fn = lambda y, c: a @ y + c
        return jnp.sum(eqlx.fixed_point(fn, solver, 0 * c, c, throw=False).value)

    grad = jax.jit(jax.grad(loss))(c)
    if gap == 0:
        assert not np.any(np.isfinite(grad))
    else:
        matrix = np.eye(2) - np.asarray(a, np.float64)
        exact = np.linalg.solve(matrix.T, np.ones(2))
        bound = 8 * np.finfo(np.float32).eps / gap
        assert relative_error(grad, exact) < bound


def _nearly_singular(num: int, size: int):
    """Float32 systems with an eigenvalue of the Jacobian 1e-3 to 1e-8 below one."""
    rng = np.random.default_rng(0)
    turns, _ = np.linalg.qr(rng.normal(size=(num, size, size)))
    closest = 1 - 10 ** -rng.uniform(3, 8, (num, 1))
    values = np.hstack([closest, rng.uniform(-0.9, 0.9, (num, size - 1))])
    jacobians = np.einsum("nij,nj,nkj->nik", turns, values, turns)
    return jacobians.astype(np.float32), rng.normal(size=(num, size)).astype(np.float32)


@pytest.mark.parametrize("name", ["default", "fixed_point", "krylov", "lu"])
def test_where_rounding_decides_the_adjoint_says_so(name):
    linear = {
        "default": None,
        "fixed_point": eqlx.FixedPointLinearSolver(),
        "krylov": eqlx.KrylovLinearSolver(),
        "lu": lx.LU(),
    }[name]
    adjoint = eqlx.ImplicitAdjoint() if linear is None else eqlx.ImplicitAdjoint(linear)
    jacobians, cotangents = _nearly_singular(200, 6)

    @jax.jit
    @jax.vmap
    def run(jacobian, cotangent):
        sol = eqlx.solve_adjoint(
            lambda y, a: a @ y,
            eqlx.Anderson(1e-6, 1e-6),
            0 * cotangent,
            cotangent,
            jacobian,
            adjoint=adjoint,
            throw=False,
        )
        is_singular = sol.result == eqlx.RESULTS.singular
        return sol.value, sol.stats["is_usable"], is_singular

    got, is_usable, is_singular = map(np.asarray, run(jacobians, cotangents))
    systems = np.eye(6) - np.swapaxes(jacobians.astype(float), 1, 2)
    exact = np.linalg.solve(systems, cotangents[..., None].astype(float))[..., 0]
    size = np.max(np.abs(exact), axis=1)
    error = np.max(np.abs(got - exact), axis=1) / size
    assert np.all(error[is_usable] < 0.2)
    # How much larger than its right-hand side: what rounding is multiplied by.
    growth = size / np.max(np.abs(cotangents), axis=1)
    eps = np.finfo(np.float32).eps
    assert not np.any(is_usable & (growth * eps > 0.01))
    most = 1e-3 if name != "krylov" else 1e-4
    assert np.all(is_usable[growth * eps < most])
    assert not np.any(is_singular & is_usable)
    assert np.any(is_singular) or name == "krylov"


def test_a_singular_adjoint_is_named_in_the_error():
    jacobians, cotangents = _nearly_singular(1, 3)
    a = jnp.asarray(jacobians[0] / np.max(np.linalg.eigvalsh(jacobians[0])))
    a = (1 - 2e-7) * a

    def loss(c):
        solver = eqlx.FixedPointIteration(1e-6, 1e-6)
        linear = eqlx.ImplicitAdjoint(lx.LU())
        # From the solution, which it takes no step to reach.
        sol = eqlx.fixed_point(lambda y, c: a @ y + c, solver, 0 * c, c, adjoint=linear)
        return jnp.sum(cotangents[0] * sol.value)

    with pytest.raises(Exception, match="singular, or so nearly that rounding decides"):
        jax.block_until_ready(jax.jit(jax.grad(loss))(jnp.zeros(3, _single)))
