"""The samples of a batch do not know of each other, whatever becomes of them.

`EQUILAX_EXAMPLES=2000 pytest tests/property` draws 2,000 examples in this folder.
"""

import dataclasses
import functools as ft

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from .checks import check_status
from .maps import as_batch, draw, Truth
from .profile import choose, examples
from .runs import BATCH, BATCHINGS, compiled, lone, RESULT_NAMES, SOLVERS, structure


_FIELDS = {
    "form": ("tree", "dense", "sparse"),
    "dtype": (jnp.float32, jnp.float64, jnp.complex64, jnp.bfloat16, jnp.float16),
    "size": (3, 8, 17, 1),
    "solver": SOLVERS,
    "adjoint": ("default", "fixed_point", "krylov", "neumann"),
    "batching": ("staged", "staged", "lockstep", "vmapped"),
    "nest": ("vmap_of_grad", "grad_of_vmap", "vmap_of_vmap", "shard_map"),
    "max_steps": (256, 256, 6),
}
_STRUCTURES = [structure(row) for row in choose(_FIELDS, 5, 40)]
_OTHERS = {
    "nan input": dict(x=np.nan),
    "infinite input": dict(x=np.inf),
    "nan guess": dict(y0=np.nan),
    "nan weights": dict(weights=np.nan),
    "infinite weights": dict(weights=np.inf),
    "nan cotangent": dict(ct=np.nan),
    "infinite cotangent": dict(ct=np.inf),
    "huge weights": dict(weights=1e4),
}


def _batch(kind, seed, gains):
    rng = np.random.default_rng(seed)
    maps = [draw(kind, rng, gain, 1.0) for gain in gains]
    y0, ct = (np.stack([draw(kind, rng, 0.0, 1.0).x for _ in maps]) for _ in range(2))
    weights, places, x = (np.asarray(a) for a in as_batch(maps))
    return maps, dict(weights=weights, x=x, y0=y0, ct=ct, places=places)


def _run(fn, arrays, tol, shape=(BATCH,)):
    a = {name: jnp.asarray(x) for name, x in arrays.items()}
    tolerances = [jnp.full(shape, t, jnp.float32) for t in (tol, tol)]
    inexact = (a["weights"], a["x"], a["y0"])
    grads, out = fn(inexact, a["places"], a["ct"], *tolerances)
    of_weights, of_x, _ = grads
    return jax.tree.map(np.asarray, dict(out, of_weights=of_weights, of_x=of_x))


def _spoilt(arrays, keep, names):
    """Another batch, of which one sample is the same."""
    arrays = {name: np.array(x) for name, x in arrays.items()}
    others = [i for i in range(BATCH) if i != keep]
    for i, name in zip(others, names, strict=True):
        for field, value in _OTHERS[name].items():
            arrays[field][i] = value
    return arrays


def _difference(a, b) -> float:
    a, b = (np.asarray(x).astype(complex) for x in (a, b))
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    finite = np.isfinite(a)
    size = 1 + np.max(np.abs(a[finite]), initial=0)
    return float(np.max(np.abs(a[finite] - b[finite]), initial=0) / size)


def _check_same(a, b, bound):
    """Two runs of a sample, between which sums may be rounded in another order."""
    for name in ("value", "of_x", "of_weights"):
        assert _difference(a[name], b[name]) <= bound, name
    if bound == 0:
        assert a["result"] == b["result"]
        assert a["num_steps"] == b["num_steps"]
    # By rounding one of them may reach its tolerance a step earlier.
    assert {RESULT_NAMES[int(r["result"])] for r in (a, b)} <= _compatible(a, b)


def _compatible(a, b):
    names = {"successful", "stagnation", "max_steps_reached"}
    return names if abs(int(a["num_steps"]) - int(b["num_steps"])) <= 64 else set()


def _bound(kind, tol, gain):
    return 16 * (tol + (kind.size + 8) * kind.eps) / (1 - gain) ** 2


_settings = dict(
    seed=st.integers(0, 2**32 - 1),
    gains=st.lists(st.floats(0.0, 0.8), min_size=BATCH, max_size=BATCH),
    digits=st.floats(0.0, 1.0),
)


def _tolerance(kind, digits):
    loose = (64 * kind.eps) ** 0.5
    return float(np.float32(loose * (64 * kind.eps / loose) ** digits))


@given(
    s=st.sampled_from(_STRUCTURES),
    keep=st.integers(0, BATCH - 1),
    names=st.lists(
        st.sampled_from(sorted(_OTHERS)), min_size=BATCH - 1, max_size=BATCH - 1
    ),
    **_settings,
)
@examples(20, 0.1)
def test_no_sample_harms_another(s, keep, names, seed, gains, digits):
    _, arrays = _batch(s.kind, seed, gains)
    tol = _tolerance(s.kind, digits)
    fn = compiled(s)
    spoilt = _run(fn, _spoilt(arrays, keep, names), tol)
    row = {k: v[keep] for k, v in _run(fn, arrays, tol).items()}
    got = {k: v[keep] for k, v in spoilt.items()}
    # A stage of another width is another program, which may round differently.
    is_same_program = s.batching != "staged"
    _check_same(row, got, 0.0 if is_same_program else _bound(s.kind, tol, gains[keep]))
    for i, name in zip([i for i in range(BATCH) if i != keep], names, strict=True):
        if name in ("nan input", "infinite weights", "nan weights", "nan guess"):
            is_lost = RESULT_NAMES[int(spoilt["result"][i])] != "successful"
            assert is_lost or (name == "infinite weights")


@given(s=st.sampled_from(_STRUCTURES), keep=st.integers(0, BATCH - 1), **_settings)
@examples(12, 0.05)
def test_a_row_of_a_batch_is_that_sample_alone(s, keep, seed, gains, digits):
    maps, arrays = _batch(s.kind, seed, gains)
    tol = _tolerance(s.kind, digits)
    row = {k: v[keep] for k, v in _run(compiled(s), arrays, tol).items()}
    alone = {k: v[keep] for k, v in arrays.items()}
    got = _run(lone(dataclasses.replace(s, nest="alone")), alone, tol, ())
    check_status(s, Truth(maps[keep]), got, tol, tol)
    _check_same(row, got, _bound(s.kind, tol, max(gains)))


@given(s=st.sampled_from(_STRUCTURES[:3]), **_settings)
@examples(8, 0.05)
def test_the_batching_makes_no_difference(s, seed, gains, digits):
    maps, arrays = _batch(s.kind, seed, gains)
    tol = _tolerance(s.kind, digits)
    run = ft.partial(_run, arrays=arrays, tol=tol)
    outs = [run(compiled(dataclasses.replace(s, batching=b))) for b in BATCHINGS]
    for i, gain in enumerate(gains):
        rows = [{k: v[i] for k, v in out.items()} for out in outs]
        for row in rows:
            check_status(s, Truth(maps[i]), row, tol, tol)
        for row in rows[1:]:
            _check_same(rows[0], row, _bound(s.kind, tol, gain))
