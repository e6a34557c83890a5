"""The implicit graph network, and the adjacency that it is given."""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.experimental import sparse

from .helpers import dense_sensitivity, newton, relative_error


nn = eqlx.nn
_SOLVER = eqlx.Anderson(0.0, 1e-12)


def _layer(cell):
    # Of the exact adjoints that which compiles in the least time.
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_SOLVER))
    return nn.FixedPointLayer(cell, _SOLVER, adjoint=adjoint)


def _edges(key, num=6):
    """Random weights of about a third of all edges, directed."""
    kept, weight = jr.split(key)
    weights = jr.uniform(weight, (num, num), minval=0.5)
    return jnp.where(jr.bernoulli(kept, 0.3, (num, num)), weights, 0.0)


def _fn(z, args):
    (w, u, b), inputs, adjacency = args
    return jnp.tanh(adjacency @ z @ w.T + inputs @ u.T + b[None])


def test_equilibrium_and_gradients_whether_sparse_or_dense(getkey):
    cell = nn.GraphCell(3, 4, key=getkey())
    assert 0.4 < np.linalg.norm(cell.weight.weight, 2) < 1.0
    layer = _layer(cell)
    edges, inputs = _edges(getkey()), jr.normal(getkey(), (6, 3))
    arrays = cell.weight.weight, cell.injection.weight, cell.injection.bias
    adjacency = nn.normalise_adjacency(edges)
    args = arrays, inputs, adjacency
    z = newton(_fn, jnp.zeros((6, 4)), args)
    w, x, a = (
        jax.tree.map(lambda d: d.sum((0, 1)), part)
        for part in dense_sensitivity(_fn, z, args)
    )
    # With room for two entries that are not there.
    coo = nn.normalise_adjacency(sparse.BCOO.fromdense(edges, nse=14))

    def run(layer, inputs, adjacency):
        value = lambda all: (out := all[0](all[1:]), jnp.sum(out))[::-1]
        grad = eqx.filter_value_and_grad(value, has_aux=True)
        return grad((layer, inputs, adjacency))

    for each in (adjacency, coo):
        (_, out), (grads, g_inputs, g_edges) = eqx.filter_jit(run)(layer, inputs, each)
        assert np.max(np.abs(out - z)) < 1e-10
        cell = grads.cell
        got = cell.weight.weight, cell.injection.weight, cell.injection.bias
        assert relative_error((got, g_inputs), (w, x)) < 1e-9
        if each is coo:
            rows, columns = coo.indices.T
            is_real = np.asarray(rows < 6)
            expected = np.where(is_real, a[rows % 6, columns % 6], 0)
            assert relative_error(jnp.where(is_real, g_edges.data, 0), expected) < 1e-9
        else:
            assert relative_error(g_edges, a) < 1e-9


def test_a_batch_over_one_graph_and_over_several(getkey):
    cell = nn.GraphCell(3, 4, key=getkey())
    layer = _layer(cell)
    xs = jr.normal(getkey(), (2, 6, 3))
    graphs = [nn.normalise_adjacency(_edges(getkey())) for _ in range(2)]
    arrays = cell.weight.weight, cell.injection.weight, cell.injection.bias
    exact = lambda i, k: newton(_fn, jnp.zeros((6, 4)), (arrays, xs[i], graphs[k]))
    one = sparse.BCOO.fromdense(graphs[0])
    several = sparse.BCOO.fromdense(jnp.stack(graphs), n_batch=1)
    shared = jax.vmap(layer, in_axes=((0, None),))((xs, one))
    assert np.max(np.abs(shared - np.stack([exact(0, 0), exact(1, 0)]))) < 1e-10
    each = jax.vmap(layer)((xs, several))
    assert np.max(np.abs(each - np.stack([exact(0, 0), exact(1, 1)]))) < 1e-10


def test_nodes_in_another_order_have_the_same_states(getkey):
    layer = _layer(nn.GraphCell(3, 4, key=getkey()))
    adjacency = nn.normalise_adjacency(_edges(getkey()))
    inputs, order = jr.normal(getkey(), (6, 3)), jr.permutation(getkey(), 6)
    z = layer((inputs, adjacency))
    other = layer((inputs[order], adjacency[order][:, order]))
    assert np.max(np.abs(other - z[order])) < 1e-10
    assert np.max(np.abs(z[order] - z)) > 0.1


def test_an_equilibrium_reaches_over_many_edges(getkey):
    # Along a path each node listens to the one before, so what is connected to the
    # first one by eleven edges depends on it, and the first on no other.
    layer = _layer(nn.GraphCell(1, 4, key=getkey()))
    path = jnp.eye(12, k=-1)
    jacobian = jax.jacrev(lambda x: layer((x, path)).sum(1))(jnp.zeros((12, 1)))
    assert np.all(np.abs(jacobian[:, 0, 0]) > 1e-9)
    assert np.max(np.abs(jacobian[0, 1:])) < 1e-12


def test_normalising_a_path_graph():
    path = jnp.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    a, b, c = 1 / 2, 1 / np.sqrt(6), 1 / 3
    expected = np.array([[a, b, 0], [b, c, b], [0, b, a]])
    assert np.max(np.abs(nn.normalise_adjacency(path) - expected)) < 1e-15
    alone = nn.normalise_adjacency(path.at[2].set(0).at[:, 2].set(0), self_weight=0.0)
    assert np.array_equal(alone, [[0, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_a_normalised_adjacency_has_a_norm_of_at_most_one(getkey):
    edges = _edges(getkey(), 30)
    for weight in (0.0, 0.5, 1.0):
        out = np.asarray(nn.normalise_adjacency(edges, weight))
        assert 0.99 < np.linalg.norm(out, 2) < 1 + 1e-12
        full = np.asarray(edges) + weight * np.eye(30)
        expected = full / np.sqrt(np.outer(full.sum(1), full.sum(0)))
        assert np.max(np.abs(out - expected)) < 1e-14
        coo = sparse.BCOO.fromdense(edges, nse=500)
        coo = jax.jit(nn.normalise_adjacency)(coo, weight)
        assert np.max(np.abs(coo.todense() - expected)) < 1e-14


def test_the_degrees_of_a_large_hub_are_right_in_half_precision():
    # A thousand ones add up to 256 in bfloat16, one by one.
    nodes = jnp.arange(1000)
    indices = jnp.stack([jnp.zeros_like(nodes), nodes], axis=1)
    hub = sparse.BCOO((jnp.ones(1000, jnp.bfloat16), indices), shape=(1000, 1000))
    out = nn.normalise_adjacency(hub, 0.0)
    expected = np.full(1000, 1000**-0.5)
    assert out.dtype == jnp.bfloat16
    assert np.allclose(out.data[:1000].astype(jnp.float64), expected, rtol=2**-8)
