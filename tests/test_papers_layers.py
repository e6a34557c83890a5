"""The reproductions that train and bound layers, at a tiny cost."""

import functools as ft
import stat
import sys
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from bench.papers import (
    digits_equilax,
    digits_methods,
    digits_split,
    lipschitz_slopes,
    monotone_layers,
)


def test_the_dense_monotone_layer_has_the_gradients_of_differences():
    linear = _random_layer(6)
    u = np.random.default_rng(0).normal(size=6)
    weights = np.arange(1.0, 7) / 6

    def at(a, b, u):
        """The equilibrium by the plain iteration, damped, in NumPy."""
        z = np.zeros(6)
        w = (1 - linear.margin) * np.eye(6) - a.T @ a + b - b.T
        for _ in range(2000):
            z = z + 0.05 * (np.maximum(w @ z + u, 0) - z)
        return np.maximum(w @ z + u, 0)

    params = tuple(np.asarray(x) for x in (linear.a, linear.b, u))
    exact, grads = monotone_layers.dense(linear, u, at(*params))
    assert np.max(np.abs(exact - at(*params))) < 1e-12
    rng, step = np.random.default_rng(1), 1e-5
    for i, grad in enumerate(grads):
        along = rng.normal(size=grad.shape)
        ends = []
        for sign in (1, -1):
            moved = list(params)
            moved[i] = moved[i] + sign * step * along
            ends.append(weights @ at(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert np.isclose(slope, np.sum(grad * along), rtol=1e-6)


def _random_layer(size):
    layers = monotone_layers.random_layers(size, 0.5, 2)
    return jtu.tree_map(lambda x: x[1], layers)


def test_forward_backward_converges_up_to_its_limits_and_no_further():
    num, kind = 3, eqlx.nn.ForwardBackward
    layers = monotone_layers.random_layers(8, 0.5, num)
    us = monotone_layers.injections(8, num)
    solve = ft.partial(monotone_layers.solve, kind, layers, us, max_steps=20_000)
    below = solve(jnp.asarray(0.95 * monotone_layers.bounds(layers)))
    assert np.all(below.is_solved & below.is_back_solved)
    value, gradient = monotone_layers.worst(below, layers, us)
    # By the margin and the contraction of a few thousandths a step.
    assert value < 1e-7
    assert gradient < 1e-7
    limits = monotone_layers.limits(layers, below.z)
    assert np.all(limits > monotone_layers.bounds(layers))
    assert np.all(solve(jnp.asarray(0.95 * limits)).is_solved)
    assert not np.any(solve(jnp.asarray(1.05 * limits)).is_solved)


def test_the_constructed_layer_has_a_sharp_bound():
    layer = monotone_layers.sharp_layer(8, 0.5)
    # L^2 = m^2 + 1, as the rotations have a singular value of one.
    layers = jtu.tree_map(lambda x: x[None], layer)
    bound = monotone_layers.bounds(layers)
    assert np.isclose(bound[0], 2 * 0.5 / (0.25 + 1))
    assert np.isclose(monotone_layers.limits(layers, jnp.ones((1, 8))), bound)
    u = monotone_layers.all_active(layer)
    assert np.allclose(np.maximum(layer(jnp.ones(8)) + u, 0), 1)


def _first(layers):
    return jtu.tree_map(lambda x: x[0] if eqx.is_array(x) else x, layers)


def test_a_linear_layer_has_the_slope_of_its_matrix():
    # All units active, W = 0 and x of one sign: then the layer is W_o U.
    layer: Any = _first(lipschitz_slopes.bounded(2.0, 1))
    rng = np.random.default_rng(0)
    injection, output = rng.normal(size=(32, 8)), rng.normal(size=(4, 32))
    where = lambda la: (la.injection, la.output, la.v, la.s, la.bias)
    # U and W_o so small that W is (1 - m) I to the sixth digit.
    new = (1e-4 * injection, 1e-4 * output, 0 * layer.v, 0 * layer.s, 10 + layer.bias)
    layer = eqx.tree_at(where, layer, new)
    exact = 1e-8 * output @ injection / layer.margin
    xs = jr.normal(jr.key(0), (3, 8))
    found = lipschitz_slopes.singular_values(layer, xs)
    assert np.allclose(found, np.linalg.norm(exact, 2), rtol=1e-5)
    step = jnp.asarray(np.linalg.svd(exact)[2][0])
    slope = lipschitz_slopes.slope(layer, xs[0], step)
    assert np.isclose(slope, np.linalg.norm(exact, 2), rtol=1e-2)


@pytest.mark.parametrize("make", [lipschitz_slopes.bounded, lipschitz_slopes.monotone])
def test_no_slope_is_above_the_bound(make):
    layers = make(0.5, 1)
    xs, steps = lipschitz_slopes.pairs(jr.key(0), 8)
    sizes = np.linalg.norm(steps, axis=1)
    assert np.all((sizes > 0.0099) & (sizes < 10.1))
    found = np.asarray(lipschitz_slopes.tightness(layers, xs, steps))[0]
    layer = _first(layers)
    if isinstance(layer, eqlx.nn.LipschitzBoundedLayer):
        bound = 0.5
    else:
        bound = np.linalg.svd(layer.injection.weight)[1][0] / 0.5
    assert np.isclose(lipschitz_slopes.bound(layer), bound)
    assert np.max(found) <= 1
    # No two points of a segment move faster than its steepest point.
    along = xs[:, None] + np.linspace(0, 1, 300)[None, :, None] * steps[:, None]
    for slope, points in zip(found, along, strict=True):
        values = lipschitz_slopes.singular_values(layer, points)
        assert slope <= np.max(values) / bound * (1 + 1e-3)
        assert np.max(values) <= bound


def test_training_pushes_the_slope_up():
    layers = lipschitz_slopes.bounded(0.5, 1)
    xs, steps = lipschitz_slopes.pairs(jr.key(0), 8)
    with jax.numpy_dtype_promotion("standard"):  # For Optax.
        trained = lipschitz_slopes.train(layers, num_steps=20, num_pairs=4)
    before, after = (
        np.mean(lipschitz_slopes.tightness(x, xs, steps)) for x in (layers, trained)
    )
    assert 1.2 * before < after <= 1
    with jax.numpy_dtype_promotion("standard"):  # For Optax.
        climbed = lipschitz_slopes.climb(
            layers, xs[None, :2], steps[None, :2], num_steps=20
        )
    start = DISTANCE * steps[:2] / jnp.linalg.norm(steps[:2], axis=1, keepdims=True)
    first = lipschitz_slopes.tightness(layers, xs[:2], start)
    assert np.all(np.asarray(first)[0] < np.asarray(climbed)[0])
    assert np.max(climbed) <= 1


DISTANCE = lipschitz_slopes.DISTANCE


def test_the_split_and_the_batches_of_the_digits():
    images, held_out, labels, expected = digits_split.load()
    assert images.shape == (1347, 64)
    assert held_out.shape == (450, 64)
    assert len(labels) == 1347
    assert len(expected) == 450
    chosen = digits_split.batches(1347, 0, 0)
    assert chosen.shape == (21, 64)
    assert len(np.unique(chosen)) == 21 * 64
    assert np.any(chosen != digits_split.batches(1347, 0, 1))


def test_a_training_on_digits_by_the_gradient_that_it_names():
    way = digits_equilax.Way("implicit", penalty=0.1)
    with jax.numpy_dtype_promotion("standard"):  # For Optax.
        found = digits_equilax.train(way, seed=0, epochs=2)
    assert 0.5 < found["accuracy"] < 1
    assert 5 < found["training evals"] < digits_split.MAX_STEPS
    # The weight that is solved with has the norm asked for, by NumPy.
    model = digits_equilax.Classifier(way, key=jr.key(0))
    cell: Any = model.layer.cell
    weight = np.asarray(cell.weight, np.float64)
    u = jnp.asarray(np.linalg.svd(weight)[0][:, 0], jnp.float32)
    layer: Any = model.normalised(way, u, jnp.ones((), jnp.float32))
    assert np.isclose(np.linalg.norm(layer.cell.weight, 2), digits_split.NORM, 1e-5)


def test_phantom_and_one_step_are_backpropagation_through_their_steps():
    # z = w z + x, of slope w: k damped steps from the solution.
    w, damp = 0.5, digits_split.DAMP
    shrink = damp + (1 - damp) * w
    exact = {
        "implicit": 1 / (1 - w),
        "phantom": (1 - shrink**digits_split.TERMS) / (1 - w),
        "one step": 1.0,
    }
    for method, slope in exact.items():
        adjoint = digits_equilax.Way(method).adjoint()

        def value(x, adjoint=adjoint):
            solver = eqlx.FixedPointIteration(0.0, 1e-10)
            fn = lambda z, x: w * z + x
            sol = eqlx.fixed_point(fn, solver, jnp.zeros(1), x, adjoint=adjoint)
            return jnp.sum(sol.value)

        found = jax.grad(value)(jnp.ones(1))
        # The adjoint of the first is solved to 4e-4, from below.
        assert np.isclose(found[0], slope, rtol=1e-3 if method == "implicit" else 1e-9)


def _interpreter(path, answer):
    """Something that is called as an interpreter, and answers each line alike."""
    lines = "for line in sys.stdin: print(sys.argv[2], flush=True)"
    code = f"import sys; print(sys.argv[2], flush=True)\n{lines}"
    script = f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$1\" '{answer}'\n"
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_other_library_runs_in_a_process_of_its_own(tmp_path):
    peer = digits_methods.TorchDEQ(_interpreter(tmp_path / "a", '{"accuracy": 0.5}'))
    assert peer.train("implicit", 3) == {"accuracy": 0.5}
    peer.close()
    silent = tmp_path / "b"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(silent.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(RuntimeError, match="ended with 3"):
        digits_methods.TorchDEQ(str(silent))
