"""Random maps under random settings: values, statuses and derivatives.

`EQUILAX_EXAMPLES=2000 pytest tests/property` draws 2,000 examples in this folder.
"""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from .checks import check_status, check_value, Derivative
from .maps import as_batch, draw, Truth
from .profile import choose, examples
from .runs import (
    ADJOINTS,
    BATCH,
    BATCHINGS,
    compiled,
    forward,
    NESTS,
    SOLVERS,
    structure,
)


_FIELDS = {
    "form": ("dense", "sparse", "tree"),
    "dtype": (jnp.float32, jnp.bfloat16, jnp.float64, jnp.complex64, jnp.float16),
    "size": (3, 17, 0, 8, 1, 40, 2),
    "solver": SOLVERS,
    "adjoint": tuple(ADJOINTS),
    "batching": tuple(BATCHINGS),
    "nest": NESTS,
    "max_steps": (256, 256, 256, 5),
}
_STRUCTURES = [structure(row) for row in choose(_FIELDS, 10, 120)]
_FORWARD = [structure(row) for row in choose(_FIELDS | {"nest": ("jvp",)}, 3, 30)]


@st.composite
def batches(draw_from, kind):
    """Maps, first guesses, right-hand sides, and tolerances that rounding allows."""
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    gains = draw_from(
        st.lists(st.floats(0.0, 0.9), min_size=BATCH, max_size=BATCH)
        | st.lists(st.floats(0.0, 3.0), min_size=BATCH, max_size=BATCH)
    )
    scale = draw_from(st.sampled_from([1.0, 0.1, 3.0, 0.0]))
    maps = [draw(kind, rng, gain, scale) for gain in gains]
    guesses = [draw(kind, rng, 0.0, draw_from(st.sampled_from([0.0, 1.0]))).x] * BATCH
    vectors = [draw(kind, rng, 0.0, 1.0).x for _ in range(BATCH)]
    digits = draw_from(st.floats(0.0, 1.0))
    loose = float(min(1e-2, (64 * kind.eps) ** 0.5))
    tol = float(np.float32(loose * (64 * kind.eps / loose) ** digits))
    rtol, atol = draw_from(st.sampled_from([(0.0, tol), (tol, tol), (tol / 8, tol)]))
    return maps, np.stack(guesses), np.stack(vectors), rtol, atol


def _tolerances(*values):
    return [jnp.full(BATCH, value, jnp.float32) for value in values]


def _row(tree, i):
    return {k: v[i] for k, v in tree.items()}


# Each structure has its turn.
@pytest.mark.parametrize("s", _STRUCTURES, ids=repr)
@given(st.data())
@examples(4, 0.7 / len(_STRUCTURES))
def test_values_statuses_and_gradients(s, data):
    maps, y0, cts, rtol, atol = data.draw(batches(s.kind))
    weights, places, x = as_batch(maps)
    inexact = (weights, x, jnp.asarray(y0))
    tolerances = _tolerances(rtol, atol)
    grads, out = compiled(s)(inexact, places, jnp.asarray(cts), *tolerances)
    for i, one in enumerate(maps):
        truth, row = Truth(one), _row(out, i)
        is_success = check_status(s, truth, row, rtol, atol)
        check_value(s, truth, row["value"])
        is_easy = truth.gain < 0.8 and s.max_steps > 5
        assert is_success or not is_easy
        grad = [np.asarray(g[i]) for g in grads]
        is_number = all(np.all(np.isfinite(g.astype(complex))) for g in grad)
        # A derivative that was not found is not a number; that of a contraction is.
        assert is_number or truth.gain > 0.8 or truth.is_noisy
        if is_number and truth.has_derivative(row["value"]):
            Derivative(s, truth, row["value"], rtol, atol).check_gradient(cts[i], grad)


@pytest.mark.parametrize("s", _FORWARD, ids=repr)
@given(st.data())
@examples(3, 0.1 / len(_FORWARD))
def test_forward_mode(s, data):
    maps, y0, directions, rtol, atol = data.draw(batches(s.kind))
    weights, places, x = as_batch(maps)
    tangents = (weights, jnp.asarray(directions))
    tolerances = _tolerances(rtol, atol)
    out = forward(s)(weights, x, jnp.asarray(y0), places, tangents, *tolerances)
    for i, one in enumerate(maps):
        truth, row, tangent = Truth(one), _row(out[1], i), np.asarray(out[0][i])
        check_status(s, truth, row, rtol, atol)
        is_number = np.all(np.isfinite(tangent.astype(complex)))
        assert is_number or truth.gain > 0.8 or truth.is_noisy
        if is_number and truth.has_derivative(row["value"]):
            derivative = Derivative(s, truth, row["value"], rtol, atol)
            derivative.check_tangent((one.weights, directions[i]), tangent)


@pytest.mark.parametrize("dtype", _FIELDS["dtype"])
def test_the_truth_itself(dtype):
    # By finite differences, in double precision.
    kind = structure({"form": "sparse", "dtype": dtype, "size": 5}).kind
    truth = Truth(draw(kind, np.random.default_rng(0), 0.7, 1.0))
    y, step = truth.solve(), 1e-6
    assert np.max(np.abs(truth(y) - y)) < 1e-15
    moves = step * np.eye(y.size)
    columns = [(truth(y + d) - truth(y - d)) / (2 * step) for d in moves]
    jacobian = truth.slope(y) @ truth.w
    assert np.allclose(np.stack(columns, 1), jacobian, atol=1e-8)
