"""Huge, tiny and missing numbers: in the problem, in the cotangent, as tolerances.

`EQUILAX_EXAMPLES=2000 pytest tests/property` draws 2,000 examples in this folder.
"""

import dataclasses
import functools as ft
from typing import Any

import equilax as eqlx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from .profile import choose, examples
from .runs import ADJOINTS, make_solver, RESULT_NAMES, SOLVERS


@dataclasses.dataclass(frozen=True)
class _Structure:
    dtype: Any
    size: int
    solver: str
    adjoint: str


_FIELDS = {
    "dtype": (jnp.float32, jnp.float64, jnp.float32),
    "size": (3, 1, 12),
    "solver": SOLVERS,
    "adjoint": ("default", "fixed_point", "krylov", "lu"),
}
_STRUCTURES = [_Structure(**row) for row in choose(_FIELDS, 7, 36)]
_ODD = (np.nan, np.inf, -np.inf, 3e38, 1e-45, -1e-3, 0.0, -0.0)


def _fn(y, args):
    w, b = args
    return w @ y + b


@ft.cache
def _compiled(s: _Structure):
    def loss(w, b, y0, ct, rtol, atol):
        sol = eqlx.fixed_point(
            _fn,
            make_solver(s.solver, rtol, atol),
            y0,
            (w, b),
            adjoint=ADJOINTS[s.adjoint],
            throw=False,
        )
        results = [sol.result == getattr(eqlx.RESULTS, name) for name in RESULT_NAMES]
        residual, steps = sol.stats["residual"], sol.stats["num_steps"]
        return jnp.sum(ct * sol.value), (sol.value, results, residual, steps)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def _problem(s: _Structure, seed: int, gain: float):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(s.size, s.size))
    w = (gain * w / np.linalg.norm(w, 2)).astype(s.dtype)
    b, y0, ct = rng.uniform(0.5, 1.0, (3, s.size)) * rng.choice([-1, 1], (3, s.size))
    return w, b, y0, ct


def _run(s, w, b, y0, ct, rtol, atol):
    as_array = lambda x: jnp.asarray(np.asarray(x, s.dtype))
    with np.errstate(all="ignore"):
        arrays = [as_array(x) for x in (w, b, y0, ct, rtol, atol)]
    grads, (value, results, residual, steps) = _compiled(s)(*arrays)
    assert sum(map(bool, results)) == 1
    name = RESULT_NAMES[int(np.argmax(results))]
    return [np.asarray(g) for g in grads], np.asarray(value), name, residual, int(steps)


_sizes = st.floats(-30.0, 30.0).map(lambda e: float(10**e))


@given(
    s=st.sampled_from(_STRUCTURES),
    seed=st.integers(0, 2**32 - 1),
    gain=st.floats(0.0, 0.8),
    scale=_sizes,
    start=st.sampled_from([0.0, 1e-6, 1.0, 100.0]),
    of_ct=st.floats(-25.0, 25.0).map(lambda e: float(10**e)),
    is_relative=st.booleans(),
)
@examples(20, 0.05)
def test_problems_of_any_scale(s, seed, gain, scale, start, of_ct, is_relative):
    w, b, y0, ct = _problem(s, seed, gain)
    eps = float(jnp.finfo(s.dtype).eps)
    # In units of the problem. An element near zero has no relative precision.
    tol = 1e-4
    rtol, atol = (tol, tol * 1e-2 * scale) if is_relative else (0.0, tol * scale)
    # The gradient in `w` is in units of both.
    of_ct = float(np.clip(of_ct, 1e-30 / scale, 1e30 / scale))
    b, y0, ct = scale * b, scale * start * y0, of_ct * ct
    grads, value, name, residual, _ = _run(s, w, b, y0, ct, rtol, atol)
    a = np.eye(s.size) - w.astype(float)
    expected = np.linalg.solve(a, b)
    assert name == "successful"
    bound = 2 * (tol * np.max(np.abs(expected)) + atol) / (1 - gain)
    bound *= np.sqrt(s.size)
    assert np.max(np.abs(value - expected)) <= bound
    assert float(residual) <= bound
    u = np.linalg.solve(a.T, ct)
    error = 64 * (1e-3 + eps) * np.max(np.abs(ct)) / (1 - gain)
    assert np.max(np.abs(grads[1] - u)) <= error
    outer = np.outer(u, value.astype(float))
    assert np.max(np.abs(grads[0] - outer)) <= error * np.max(np.abs(value)) + 1e-37


@given(
    s=st.sampled_from(_STRUCTURES[:3]),
    seed=st.integers(0, 2**32 - 1),
    field=st.sampled_from(["w", "b", "y0", "ct", "rtol", "atol"]),
    odd=st.sampled_from(_ODD),
)
@examples(24, 0.05)
def test_numbers_that_are_none(s, seed, field, odd):
    w, b, y0, ct = _problem(s, seed, 0.5)
    arrays = dict(w=w, b=b, y0=y0, ct=ct, rtol=np.array(1e-4), atol=np.array(1e-4))
    arrays[field].flat[seed % arrays[field].size] = odd
    grads, value, name, residual, steps = _run(s, **arrays)
    given = {k: np.asarray(np.asarray(v, s.dtype), float) for k, v in arrays.items()}
    with np.errstate(all="ignore"):
        moved = np.abs(given["w"] @ value + given["b"] - value)
        tolerance = given["atol"] + given["rtol"] * np.abs(value)
    assert 0 <= steps <= 256
    if name == "successful":
        rounding = 64 * float(jnp.finfo(s.dtype).eps) * (1 + np.max(np.abs(value)))
        # What does not move at all has converged, whatever the tolerance.
        allowed = 1.001 * np.nan_to_num(tolerance, nan=0, posinf=np.inf, neginf=0)
        allowed = np.maximum(allowed, 0)
        assert np.all(np.isfinite(value))
        assert np.all(moved <= allowed + rounding)
    if name == "nonfinite":
        assert not np.all(np.isfinite(moved)) or odd in (3e38, -3e38)
    if field == "ct" and not np.isfinite(odd):
        assert not np.all(np.isfinite(grads[1]))
    is_plain = np.isfinite(odd) and abs(odd) < 1
    if is_plain and field in ("b", "y0", "ct"):
        assert name == "successful"
        u = np.linalg.solve(np.eye(s.size) - given["w"].T, given["ct"])
        assert np.max(np.abs(grads[1] - u)) < 1e-2
    del residual
