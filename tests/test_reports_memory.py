"""Memory, retracing and compile caches, of the kinds that `tests/README.md` lists."""

import gc
import logging
import weakref

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.extend.backend import get_backend

from .helpers import Counted, every_solver, tanh_cell, tanh_problem


_LEAN = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver())


class _Cell(eqx.Module):
    weight: jax.Array
    activation: Counted

    def __call__(self, z, x):
        return self.activation(self.weight @ z + x)


def test_new_modules_and_numbers_of_one_shape_are_not_traced_again(getkey):
    w, x = tanh_problem(getkey(), 4, 0.5)
    activation = Counted(jnp.tanh)

    def loss(cell, x, tol):
        solver = eqlx.FixedPointIteration(0.0, tol)
        sol = eqlx.fixed_point(cell, solver, 0 * x, x, adjoint=_LEAN, throw=False)
        return jnp.sum(sol.value), sol.stats["num_steps"]

    step = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    num_steps = []
    for k in range(4):
        cell = _Cell(w * (1 - 0.1 * k), activation)
        (_, num), _ = step(cell, x * (1 + 0.1 * k), jnp.array(10.0 ** (-3 - 2 * k)))
        num_steps.append(int(num))
    assert len(activation.traces) == 1
    assert num_steps[0] < num_steps[-1]


@pytest.mark.parametrize("name", list(every_solver(0.0, 0.0)))
def test_settings_of_equal_values_are_equal_and_hash_alike(name):
    first, again = (every_solver(1e-3, 1e-6)[name] for _ in range(2))
    assert first is not again
    assert first == again
    assert hash(first) == hash(again)
    other = every_solver(1e-3, 1e-5)[name]
    assert first != other


def test_a_solve_outside_of_jit_is_compiled_once_for_settings_made_anew(getkey):
    w, x = tanh_problem(getkey(), 4, 0.5)
    counted = Counted(tanh_cell)
    for k in range(50):
        solver = eqlx.FixedPointIteration(0.0, 1e-3)
        adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver())
        eqlx.fixed_point(
            counted, solver, 0 * x, (w, x + k), adjoint=adjoint, batching=eqlx.Staged()
        )
    assert len(counted.traces) == 1


def _by_a_new_function(kind, x):
    """One solve, or what goes with it, by a function that nobody has afterwards."""
    fn = lambda y, x: 0.5 * jnp.tanh(y) + x
    solver = eqlx.FixedPointIteration(0.0, 1e-3)
    solve = lambda x: eqlx.fixed_point(fn, solver, 0 * x, x).value
    if kind == "value":
        solve(x)
    elif kind == "gradient":
        jax.grad(lambda x: jnp.sum(solve(x)))(x)
    elif kind == "batch":
        jax.vmap(solve)(jnp.stack([x, 2 * x]))
    elif kind == "jit":
        jax.jit(solve)(x)
    elif kind == "failure":
        with pytest.raises(Exception, match="failed"):
            eqlx.fixed_point(fn, solver, 0 * x, x, max_steps=1)
    else:
        eqlx.solve_adjoint(fn, solver, x, x, x)
    return weakref.ref(fn)


@pytest.fixture
def no_records():
    """Who keeps the records keeps all that an error has passed through."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "kind", ["value", "gradient", "batch", "jit", "failure", "adjoint"]
)
def test_programs_go_with_the_functions_that_they_were_made_of(kind, no_records):
    x = jnp.ones(4)
    nums = []
    for _ in range(4):
        known = _by_a_new_function(kind, x)
        gc.collect()
        assert known() is None
        nums.append(len(get_backend().live_executables()))
    assert nums[-1] <= nums[0]


def test_an_error_outside_of_jit_says_no_more_than_what_failed():
    fn = lambda y, a: a * y + 1
    solver = eqlx.FixedPointIteration(0.0, 1e-8)
    with pytest.raises(eqx.EquinoxRuntimeError) as error:
        eqlx.fixed_point(fn, solver, jnp.zeros(()), 0.9, max_steps=3)
    lines = str(error.value).splitlines()
    assert lines[0] == "The fixed-point solve failed."
    assert lines[2:] == [
        "After 3 steps, with a residual of 0.729.",
        "`throw=False` returns the outcome in `Solution.result` instead.",
    ]


def _temporary(fn, *args):
    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("order", ["hvp", "forward", "batch"])
def test_memory_does_not_depend_on_the_steps_allowed(getkey, order):
    w, x = tanh_problem(getkey(), 16, 0.8, jnp.float32)

    def loss(w, x, max_steps):
        solver = eqlx.FixedPointIteration(0.0, 1e-6)
        start = jnp.zeros(16, jnp.float32)
        sol = eqlx.fixed_point(
            tanh_cell,
            solver,
            start,
            (w, x),
            max_steps=max_steps,
            adjoint=_LEAN,
            throw=False,
        )
        return jnp.sum(sol.value)

    def of(max_steps):
        one = lambda w, x: loss(w, x, max_steps)
        if order == "batch":
            run = lambda w, xs: jnp.sum(jax.vmap(one, (None, 0))(w, xs))
            return jax.grad(run), jnp.stack([x, 2 * x, 3 * x])
        if order == "forward":
            return lambda w, x: jax.jvp(lambda x: one(w, x), (x,), (x,)), x
        inner = lambda w, x: jnp.vdot(jax.grad(one)(w, x), w)
        return jax.grad(inner), x

    sizes = [_temporary(fn, w, x) for fn, x in (of(10), of(5000))]
    assert sizes[0] == sizes[1]
