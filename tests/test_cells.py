"""What every cell must do, and what is particular to those of a vector."""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import equilax as eqlx
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import relative_error


nn = eqlx.nn


class _Case(NamedTuple):
    """How to make a cell and an input of either of two sizes, 1 and 2."""

    cell: Callable[..., Any]
    x: Callable[..., Any]


def _vector(size, dtype, key):
    return jr.normal(key, (2 + size,), dtype)


def _sequence(size, dtype, key):
    return jr.normal(key, (2 + 2 * size, 3), dtype)


def _padded(size, dtype, key):
    length = 2 + 2 * size
    mask = jnp.broadcast_to(jnp.arange(length) < length - 1, (length, length))
    return _sequence(size, dtype, key), mask


def _image(size, dtype, key):
    return jr.normal(key, (2, 4 * size, 4), dtype)


def _graph(size, dtype, key):
    x_key, a_key = jr.split(key)
    num = 3 + 2 * size
    weights = jr.uniform(a_key, (num, num), dtype)
    return jr.normal(x_key, (num, 3), dtype), nn.normalise_adjacency(weights)


def _rotary(size, **kwargs):
    position = eqx.nn.RotaryPositionalEmbedding(2 * size, dtype=kwargs["dtype"])
    options = {"causal": True, "position": position, "dropout": 0.2}
    return nn.TransformerCell(3, 4 * size, 2, 6, **options, **kwargs)


_CASES = {
    "mlp": _Case(lambda s, **kw: nn.MLPCell(2 + s, 4 * s, 5, s, **kw), _vector),
    "gru": _Case(lambda s, **kw: nn.GRUCell(2 + s, 4 * s, **kw), _vector),
    "transformer": _Case(_rotary, _sequence),
    "pre_norm": _Case(
        lambda s, **kw: nn.TransformerCell(3, 4 * s, 2, 6, pre_norm=True, **kw),
        _padded,
    ),
    "conv": _Case(lambda s, **kw: nn.ConvCell(2, 4, s, **kw), _image),
    "multiscale": _Case(lambda s, **kw: nn.MultiscaleCell(2, (2, 4), s, **kw), _image),
    "graph": _Case(lambda s, **kw: nn.GraphCell(3, 4 * s, **kw), _graph),
}
every_cell = pytest.mark.parametrize("case", _CASES.values(), ids=_CASES)


@eqx.filter_jit
def _new(case, size, dtype, keys):
    """A cell and an input for each key."""

    def one(key):
        cell_key, x_key = jr.split(key)
        return case.cell(size, dtype=dtype, key=cell_key), case.x(size, dtype, x_key)

    return eqx.filter_vmap(one)(keys)


def _ravel(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def _loss(both, tolerance, key):
    """A weighted sum of a fixed point: that of a normalised state itself is zero."""
    cell, x = both
    solver = eqlx.Anderson(tolerance, tolerance)
    # Of those that are exact, the one that compiles in the least time.
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))
    sol = nn.FixedPointLayer(cell, solver, adjoint=adjoint).solve(x, key=key)
    z = _ravel(sol.value)
    return jnp.sum(jnp.sin(jnp.arange(z.size)).astype(z.dtype) * z), sol


def _keyword(cell, key):
    return {"key": key} if isinstance(cell, nn.TransformerCell) else {}


def _reference(both, key):
    """A fixed point and the gradient of `_loss`, by dense solves."""
    dynamic, static = eqx.partition(both, eqx.is_inexact_array)
    cell, x = both
    z, unravel = jax.flatten_util.ravel_pytree(cell.init(x))

    @jax.jit
    def evaluate(z, dynamic, u):
        def fn(z, dynamic):
            cell, x = eqx.combine(dynamic, static)
            return _ravel(cell(unravel(z), x, **_keyword(cell, key)))

        out, pull = jax.vjp(lambda dynamic: fn(z, dynamic), dynamic)
        return out, jax.jacfwd(fn)(z, dynamic), pull(u)[0]

    identity = np.eye(z.size)
    out, jacobian, _ = evaluate(z, dynamic, z)
    for i in range(40):
        # Newton's steps alone may go round in circles about the kinks of a rectifier.
        z = out if i < 30 else z + np.linalg.solve(identity - jacobian, out - z)
        out, jacobian, _ = evaluate(z, dynamic, z)
    assert np.max(np.abs(out - z)) < 1e-13
    u = np.linalg.solve((identity - jacobian).T, np.sin(np.arange(z.size)))
    return z, evaluate(z, dynamic, jnp.asarray(u))[2]


@every_cell
def test_a_new_cell_has_the_value_and_gradient_of_a_dense_solve(getkey, case):
    both, key = _new(case, 1, jnp.float64, jr.split(getkey(), 4)), getkey()
    run = eqx.filter_value_and_grad(lambda both: _loss(both, 1e-11, key), has_aux=True)
    (_, sol), grads = eqx.filter_jit(eqx.filter_vmap(run))(both)
    assert jnp.all(sol.result == eqlx.RESULTS.successful)
    assert jnp.max(sol.stats["num_steps"]) < 60
    arrays = lambda tree, i: jax.tree.map(
        lambda a: a[i], eqx.filter(tree, eqx.is_inexact_array)
    )
    one = eqx.combine(
        jax.tree.map(lambda a: a[1], eqx.filter(both, eqx.is_array)),
        eqx.filter(both, eqx.is_array, inverse=True),
    )
    z, expected = _reference(one, key)
    value = jax.tree.map(lambda a: a[1], sol.value)
    assert np.max(np.abs(_ravel(value) - z)) < 1e-9
    assert relative_error(arrays(grads, 1), expected) < 1e-8


@every_cell
def test_a_new_cell_converges_whatever_the_seed(getkey, case):
    both = _new(case, 2, jnp.float32, jr.split(getkey(), 8))
    solve = lambda both, key: _loss(both, 1e-5, key)[1]
    run = eqx.filter_vmap(solve, in_axes=(eqx.if_array(0), None))
    sol = eqx.filter_jit(run)(both, getkey())
    assert jnp.all(sol.result == eqlx.RESULTS.successful)
    assert jnp.max(sol.stats["num_steps"]) < 30
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(sol.value))


def _to_float64(tree):
    convert = lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a
    return jax.tree.map(convert, tree)


# The post-norm block has all that the pre-norm one has.
@pytest.mark.parametrize("name", sorted(_CASES.keys() - {"pre_norm"}))
def test_in_half_precision_the_status_is_true(getkey, name):
    both = _new(_CASES[name], 1, jnp.bfloat16, jr.split(getkey(), 3))
    key, tolerance = getkey(), 0.05

    def residual(both, z):
        cell, x = _to_float64(both)
        if isinstance(cell, nn.TransformerCell) and cell.position is not None:
            size = cell.position.embedding_size
            turn = eqx.nn.RotaryPositionalEmbedding(size, dtype=jnp.float64)
            cell = eqx.tree_at(lambda cell: cell.position, cell, turn)
        z = _to_float64(z)
        out = _ravel(cell(z, x, **_keyword(cell, key)))
        return jnp.max(jnp.abs(out - _ravel(z)) / (1 + jnp.abs(_ravel(z))))

    def run(both):
        grad = eqx.filter_value_and_grad(_loss, has_aux=True)
        (_, sol), grads = grad(both, tolerance, key)
        return sol, grads, residual(both, sol.value)

    sol, grads, residuals = eqx.filter_jit(eqx.filter_vmap(run))(both)
    assert jnp.all(sol.result == eqlx.RESULTS.successful)
    # The cell itself is off by some units in the last place, of 0.008 each.
    assert jnp.max(residuals) < 2 * tolerance
    for leaf in jax.tree.leaves(eqx.filter((sol.value, grads), eqx.is_inexact_array)):
        assert leaf.dtype == jnp.bfloat16
        assert jnp.all(jnp.isfinite(leaf))


@every_cell
def test_serialisation_brings_back_every_bit(getkey, case):
    cell, _ = _new(case, 1, jnp.float64, jr.split(getkey(), 4))
    other, _ = _new(case, 1, jnp.float64, jr.split(getkey(), 4))
    assert not eqx.tree_equal(cell, other)
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, cell)
    buffer.seek(0)
    assert eqx.tree_equal(cell, eqx.tree_deserialise_leaves(buffer, other))


def _float64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def test_an_mlp_cell_contracts_by_a_bound_on_its_slope(getkey):
    cell = nn.MLPCell(10, 60, 90, 3, key=getkey())
    weights = [layer.weight for layer in cell.mlp.layers]
    bound = np.linalg.norm(weights[0][:, :60], 2)
    bound *= np.prod([np.linalg.norm(w, 2) for w in weights[1:]])
    assert 0.7 < bound < 0.9
    z, x = jr.normal(getkey(), (60,)), jr.normal(getkey(), (10,))
    expected = np.concatenate([z, x])
    for i, layer in enumerate(cell.mlp.layers):
        weight, bias = _float64(layer.weight, layer.bias)
        expected = weight @ expected + bias
        expected = np.tanh(expected) if i < 3 else expected
    assert np.max(np.abs(cell(z, x) - expected)) < 1e-12
    # The input acts as in a perceptron: its columns are as Equinox has them.
    assert np.isclose(np.max(np.abs(weights[0][:, 60:])), 70**-0.5, rtol=0.05)


def test_the_gate_of_a_gru_cell_has_no_part_in_its_equilibrium(getkey):
    cell = nn.GRUCell(3, 20, key=getkey())
    for weight in jnp.split(cell.gru.weight_hh, 3):
        assert 0.6 < np.linalg.norm(weight, 2) < 1.0
    x = jr.normal(getkey(), (3,))

    def loss(cell):
        layer = nn.FixedPointLayer(cell, eqlx.Anderson(0.0, 1e-12))
        z = layer(x)
        return jnp.sum(z**2), z

    (_, z), grads = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(cell)
    w, u, b, c = _float64(
        cell.gru.weight_ih, cell.gru.weight_hh, cell.gru.bias, cell.gru.bias_n
    )
    reset, _, new = np.split(w @ x + b, 3)
    reset = 1 / (1 + np.exp(-reset - u[:20] @ z))
    assert np.max(np.abs(np.tanh(new + reset * (u[40:] @ z + c)) - z)) < 1e-10
    _, gate, new = np.split(np.abs(grads.gru.weight_hh), 3)
    assert gate.max() < 1e-9 * new.max()
