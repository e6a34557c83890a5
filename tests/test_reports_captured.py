"""Values that `fn` captures, and solves inside of what is differentiated again.

Of the kinds that `tests/README.md` lists.
"""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import (
    batch_reference,
    dense_sensitivity,
    newton,
    relative_error,
    tanh_cell,
    tanh_problem,
)


_SOLVER = eqlx.FixedPointIteration(0.0, 1e-12)
# The lean way back, which compiles in half the time.
_ADJOINT = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_SOLVER))


def _solve(fn, y0, args):
    return eqlx.fixed_point(
        fn, _SOLVER, y0, args, max_steps=2000, adjoint=_ADJOINT, throw=False
    ).value


class _Recurrent(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    gain: float = eqx.field(static=True)

    def step(self, z, x):
        return jnp.tanh(self.gain * self.weight @ z + self.bias + x)

    def scaled(self, factor):
        """A method that makes a function, which captures both."""
        return lambda z, x: self.step(factor * z, x)


def _of_method(kind, module):
    if kind == "method":
        return module.step, 1.0
    return module.scaled(jnp.array(0.5)), 0.5


@pytest.mark.parametrize("kind", ["method", "nested"])
def test_all_weights_of_a_module_get_their_gradient(getkey, kind):
    w, x = tanh_problem(getkey(), 4, 0.7)
    module, start = _Recurrent(w, 0.5 * x, 1.2), jnp.zeros(4)

    def loss(module, x):
        fn, _ = _of_method(kind, module)
        return jnp.sum(_solve(fn, start, x))

    factor = 1.2 * _of_method(kind, module)[1]
    args = (factor * w, 1.5 * x)
    dense = dense_sensitivity(tanh_cell, newton(tanh_cell, start, args), args)
    batch = eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0))
    each = eqx.filter_jit(batch)(module, jnp.stack([0 * x, x]))
    assert relative_error(each.weight[1], factor * dense[0].sum(0)) < 1e-9
    assert relative_error(each.bias[1], dense[1].sum(0)) < 1e-9


def _inverse(y, a, c):
    """The `x` at which `(a x^2 + c x) / (a + c)` is `y`."""

    def fn(x, p):
        y, a, c = p
        return x - 0.5 * ((a * x * x + c * x) / (a + c) - y)

    return _solve(fn, jnp.array(0.5), (y, a, c))


def _closed_inverse(y, a, c):
    return (-c + jnp.sqrt(c * c + 4 * a * y * (a + c))) / (2 * a)


def test_an_inverse_function_within_a_larger_derivative():
    # The derivative of a density under a change of variables: both parts at once.
    def log_density(inverse):
        def of_parameters(y, a, c):
            x, slope = jax.value_and_grad(inverse)(y, a, c)
            return jnp.log(slope) - 0.5 * x**2

        return of_parameters

    point = tuple(jnp.array(v) for v in (0.4, 0.8, 0.3))
    got = jax.jit(jax.value_and_grad(log_density(_inverse), (0, 1, 2)))(*point)
    expected = jax.value_and_grad(log_density(_closed_inverse), (0, 1, 2))(*point)
    assert relative_error(got, expected) < 1e-8


def test_a_linearised_solve_is_an_operator_of_another_solver(getkey):
    w, x = tanh_problem(getkey(), 5, 0.7)
    solve = lambda x: _solve(tanh_cell, 0 * x, (w, x))
    dense = dense_sensitivity(tanh_cell, newton(tanh_cell, 0 * x, (w, x)), (w, x))[1]
    rhs = jr.normal(getkey(), (5,))
    _, linear = jax.linearize(solve, x)
    shifted = lambda v: v + 0.5 * linear(v)
    transposed = jax.linear_transpose(shifted, x)
    matrix = np.eye(5) + 0.5 * np.asarray(dense)
    for operator, full in (
        (shifted, matrix),
        (lambda v: transposed(v)[0], matrix.T),
    ):
        got, _ = jax.scipy.sparse.linalg.gmres(operator, rhs, tol=1e-12, atol=0.0)
        assert relative_error(got, np.linalg.solve(full, rhs)) < 1e-8


def test_one_start_and_one_weight_for_a_batch_of_inputs(getkey):
    w, x = tanh_problem(getkey(), 4, 0.8)
    xs, start = jnp.stack([x, -0.3 * x, 2 * x]), jnp.zeros(4)
    _, grad_w, grad_x = batch_reference(w, xs)
    one = lambda w, x: jnp.sum(_solve(tanh_cell, start, (w, x)))
    total = lambda w, xs: jnp.sum(jax.jit(jax.vmap(one, (None, 0)))(w, xs))
    got = jax.grad(total, (0, 1))(w, xs)
    assert relative_error(got[0], grad_w) < 1e-9
    assert relative_error(got[1], grad_x) < 1e-9
