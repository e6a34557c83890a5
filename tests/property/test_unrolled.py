"""Derivatives of the steps taken, against those of the same steps in NumPy.

`EQUILAX_EXAMPLES=2000 pytest tests/property` draws 2,000 examples in this folder.
"""

import dataclasses
import functools as ft

import equilax as eqlx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from .maps import draw, Kind, to_real, Truth
from .profile import choose, examples


@dataclasses.dataclass(frozen=True)
class _Structure:
    form: str
    dtype: object
    size: int
    solver: str
    num_steps: int
    is_batch: bool

    @property
    def kind(self) -> Kind:
        return Kind(self.form, self.dtype, self.size)


_FIELDS = {
    "form": ("dense", "tree", "sparse"),
    "dtype": (jnp.float32, jnp.float64, jnp.complex64),
    "size": (3, 7, 1, 12),
    "solver": ("picard", "reversible"),
    "num_steps": (4, 1, 9, 2),
    "is_batch": (False, True),
}
_STRUCTURES = [_Structure(**row) for row in choose(_FIELDS, 4, 24)]
_BETA = 0.75
# Of a new iterate: the weight of the one before the last, and that of the image.
_WEIGHTS = {"picard": (0.0, 1.0), "reversible": (1 - _BETA, _BETA)}


@ft.cache
def _compiled(s: _Structure):
    solver, adjoint = {
        "picard": (
            eqlx.FixedPointIteration(0.0, 0.0),
            eqlx.RecursiveCheckpointAdjoint(),
        ),
        "reversible": (
            eqlx.Reversible(0.0, 0.0, beta=_BETA),
            eqlx.ReversibleAdjoint(),
        ),
    }[s.solver]

    def loss(inexact, places, ct):
        weights, x, y0 = inexact
        sol = eqlx.fixed_point(
            s.kind.fn,
            solver,
            s.kind.state(y0),
            (weights, places, x),
            max_steps=s.num_steps,
            adjoint=adjoint,
            throw=False,
        )
        value: jax.Array = s.kind.flat(sol.value)  # pyright: ignore
        total = jnp.sum(value.real * ct.real)
        if s.kind.is_complex:
            total = total + jnp.sum(value.imag * ct.imag)
        return total, value

    grad = jax.grad(loss, has_aux=True)
    return jax.jit(jax.vmap(grad) if s.is_batch else grad)


def _unrolled(s: _Structure, truth: Truth, y0, ct):
    """The last iterate, and the gradients in the weights, in `x` and in `y0`."""
    old, new = _WEIGHTS[s.solver]
    ys = [y0, y0]
    for _ in range(s.num_steps):
        ys.append(old * ys[-2] + new * truth(ys[-1]))
    bars = [np.zeros_like(y0) for _ in ys]
    bars[-1] = ct
    of_weights, of_x = 0.0, 0.0
    for k in range(len(ys) - 1, 1, -1):
        u = new * bars[k]
        by_x, by_weights = truth.gradient(ys[k - 1], u)
        of_x, of_weights = of_x + by_x, of_weights + by_weights
        bars[k - 1] = bars[k - 1] + truth.w.T @ (truth.slope(ys[k - 1]).T @ u)
        bars[k - 2] = bars[k - 2] + old * bars[k]
    of_y0 = bars[0] + bars[1]
    if s.kind.is_complex:  # By JAX's convention.
        re, im = np.split(of_y0, 2)
        of_y0 = re - 1j * im
    return ys[-1], (of_weights, of_x, of_y0)


# Not a gain of zero: where nothing moves any more a budget of steps ends early.
@pytest.mark.parametrize("s", _STRUCTURES, ids=repr)
@given(
    seed=st.integers(0, 2**32 - 1),
    gains=st.lists(st.floats(0.05, 1.5), min_size=2, max_size=2),
)
@examples(3, 0.1 / len(_STRUCTURES))
def test_gradients_are_those_of_the_steps(s, seed, gains):
    rng = np.random.default_rng(seed)
    maps = [draw(s.kind, rng, gain, 1.0) for gain in gains]
    y0s, cts = ([draw(s.kind, rng, 0.0, 1.0).x for _ in maps] for _ in range(2))
    if not s.is_batch:
        maps, y0s, cts = maps[:1], y0s[:1], cts[:1]
    rows = [
        ((m.weights, m.x, y0), m.places, ct)
        for m, y0, ct in zip(maps, y0s, cts, strict=True)
    ]
    if s.is_batch:
        arrays = jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *rows)
        out = _compiled(s)(*arrays)
    else:
        out = jax.tree.map(
            lambda a: a[None], _compiled(s)(*jax.tree.map(jnp.asarray, rows[0]))
        )
    grads, values = jax.tree.map(np.asarray, out)
    for i, one in enumerate(maps):
        wide = [to_real(s.kind, a) for a in (y0s[i], cts[i])]
        value, expected = _unrolled(s, Truth(one), *wide)
        bound = 3e4 * s.kind.eps
        assert np.max(np.abs(to_real(s.kind, values[i]) - value)) <= bound
        for got, right in zip(grads, expected, strict=True):
            size = 1 + np.max(np.abs(right))
            assert np.max(np.abs(got[i] - right)) <= bound * size
