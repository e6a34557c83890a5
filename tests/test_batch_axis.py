"""An `fn` of the whole batch, each of whose samples is solved by itself."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from .helpers import (
    batch_reference,
    relative_error,
    solver_list,
    tanh_cell,
    tanh_problem,
)


_num, _size = 5, 4
solvers = pytest.mark.parametrize("name", list(solver_list(0.0, 0.0)))


def _whole(zs, args):
    """One matrix product for all samples, which stand along the first axis."""
    w, xs = args
    return jnp.tanh(zs @ w.T + xs)


def _problem(getkey):
    w, _ = tanh_problem(getkey(), _size, 0.9)
    scales = jnp.linspace(0.01, 3, _num)[:, None]
    return w, scales * jr.normal(getkey(), (_num, _size))


def _solve(w, xs, *, solver=None, **kwargs):
    solver = eqlx.Anderson(0.0, 1e-11) if solver is None else solver
    return eqlx.fixed_point(
        _whole,
        solver,
        jnp.zeros((_num, _size)),
        (w, xs),
        batch_axis=0,
        throw=False,
        **kwargs,
    )


@solvers
def test_values_steps_and_residuals_of_each_sample(getkey, name):
    w, xs = _problem(getkey)
    solver = solver_list(0.0, 1e-11)[name]
    sol = _solve(w, xs, solver=solver)
    assert np.max(np.abs(sol.value - batch_reference(w, xs)[0])) < 1e-9
    assert np.all(sol.result == eqlx.RESULTS.successful)
    true = np.max(np.abs(_whole(sol.value, (w, xs)) - sol.value), axis=1)
    assert np.allclose(sol.stats["residual"], true, atol=1e-15)
    # As many steps as each sample takes on its own.
    for x, steps, evals in zip(
        xs, sol.stats["num_steps"], sol.stats["num_fn_evals"], strict=True
    ):
        alone = eqlx.fixed_point(tanh_cell, solver, jnp.zeros(_size), (w, x))
        assert steps == alone.stats["num_steps"]
        assert evals == steps + 1
    assert len(set(sol.stats["num_steps"].tolist())) > 1
    if name == "traced":
        assert sol.stats["trace"].shape == (_num, 257)


@pytest.mark.parametrize(
    "linear_solver",
    [
        eqlx.FixedPointLinearSolver(),
        eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, 1e-11)),
        eqlx.Neumann(300),
    ],
)
def test_gradients(getkey, linear_solver):
    w, xs = _problem(getkey)
    adjoint = eqlx.ImplicitAdjoint(linear_solver)
    loss = lambda w, xs: jnp.sum(_solve(w, xs, adjoint=adjoint).value)
    got_w, got_xs = jax.jit(jax.grad(loss, (0, 1)))(w, xs)
    _, grad_w, grad_xs = batch_reference(w, xs)
    assert relative_error(got_w, grad_w) < 1e-8
    assert relative_error(got_xs, grad_xs) < 1e-8
    tangent = jr.normal(getkey(), xs.shape)
    _, moved = jax.jvp(lambda xs: loss(w, xs), (xs,), (tangent,))
    assert np.allclose(moved, np.sum(grad_xs * tangent), rtol=1e-8)


def test_checkpointing(getkey):
    w, xs = _problem(getkey)
    adjoint = eqlx.RecursiveCheckpointAdjoint()
    solver = eqlx.FixedPointIteration(0.0, 1e-12)
    loss = lambda w: jnp.sum(_solve(w, xs, solver=solver, adjoint=adjoint).value)
    assert relative_error(jax.jit(jax.grad(loss))(w), batch_reference(w, xs)[1]) < 1e-7


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis_and_structured_states(getkey, axis):
    rates = jnp.array([0.1, 0.5, 0.9])

    def fn(y, rates):
        shape = [1, 1]
        shape[axis] = 3
        rate = rates.reshape(shape)
        return {"a": rate * y["a"] + y["b"], "b": 0.5 * y["b"] + 1.0}

    shape = {0: (3, 2), 1: (2, 3), -1: (2, 3)}[axis]
    y0 = {"a": jnp.zeros(shape), "b": jnp.zeros(shape)}
    solver = eqlx.FixedPointIteration(0.0, 1e-10)
    solve = lambda rates: eqlx.fixed_point(
        fn, solver, y0, rates, batch_axis=axis, throw=False, max_steps=500
    )
    sol = solve(rates)
    expected = np.moveaxis(np.broadcast_to(2 / (1 - rates), (2, 3)), 1, axis)
    assert sol.value["a"].shape == shape
    assert np.allclose(sol.value["a"], expected, rtol=1e-8)
    assert sol.stats["num_steps"].shape == (3,)
    assert sol.stats["num_steps"][2] > 2 * sol.stats["num_steps"][0]
    grad = jax.grad(lambda r: jnp.sum(solve(r).value["a"]))(rates)
    assert np.allclose(grad, 2 * 2 / (1 - rates) ** 2, rtol=1e-7)


def test_a_bad_sample_changes_no_other():
    rates = jnp.array([0.5, 2.0, 0.25, 0.999, 7.0])

    def fn(y, rates):
        return jnp.where(rates == 7, jnp.nan, rates * y + 1)

    def solve(rates, throw=False):
        solver = eqlx.FixedPointIteration(0.0, 1e-9)
        return eqlx.fixed_point(
            fn, solver, jnp.zeros(5), rates, batch_axis=0, throw=throw
        )

    sol = solve(rates)
    names = ("successful", "divergence", "successful", "max_steps_reached", "nonfinite")
    for i, name in enumerate(names):
        assert (sol.result == getattr(eqlx.RESULTS, name))[i], name
    good = np.array([0, 2])
    assert np.allclose(sol.value[good], [2, 4 / 3], rtol=1e-8)
    loss = lambda r: jnp.sum(solve(r).value[good])
    grad = jax.grad(loss)(rates)
    assert np.allclose(grad[good], [4, 16 / 9], rtol=1e-7)
    with pytest.raises(Exception, match=r"failed for 3 of 5 samples"):
        jax.block_until_ready(solve(rates, throw=True))


def test_under_vmap(getkey):
    w, xs = _problem(getkey)
    many = jnp.stack([xs, 0.5 * xs, -xs])
    sol = jax.jit(jax.vmap(lambda xs: _solve(w, xs)))(many)
    for value, xs in zip(sol.value, many, strict=True):
        assert np.max(np.abs(value - batch_reference(w, xs)[0])) < 1e-9


def test_batches_of_one_and_of_none():
    solver = eqlx.Anderson(0.0, 1e-9)
    for num in (0, 1):
        sol = eqlx.fixed_point(
            lambda y, _: 0.5 * y + 1, solver, jnp.zeros((num, 3)), batch_axis=0
        )
        assert sol.value.shape == (num, 3)
        assert np.allclose(sol.value, 2)


def test_wrong_calls(getkey):
    w, xs = _problem(getkey)
    solve = lambda y0, axis: eqlx.fixed_point(
        lambda y, _: y, eqlx.Anderson(0.0, 1e-3), y0, batch_axis=axis
    )
    with pytest.raises(ValueError, match=r"`batch_axis=2` .*every leaf of `y0`"):
        solve(jnp.ones((2, 3)), 2)
    with pytest.raises(ValueError, match=r"`batch_axis=0` .*\(\)"):
        solve((jnp.ones(3), jnp.ones(())), 0)
    with pytest.raises(ValueError, match=r"`y0` must have one size along"):
        solve((jnp.ones(3), jnp.ones(2)), 0)
    with pytest.raises(Exception, match=r"batch_axis"):
        solve(jnp.ones(3), 0.5)
    lu = eqlx.ImplicitAdjoint(lx.LU())
    with pytest.raises(ValueError, match="one system for the whole batch"):
        jax.grad(lambda w: jnp.sum(_solve(w, xs, adjoint=lu).value))(w)
