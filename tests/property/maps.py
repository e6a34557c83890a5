"""Random maps, their fixed points and derivatives: in JAX, and in NumPy for the truth.

`y = squash(W y + x)`, with `squash` the hyperbolic tangent, and for complex numbers
`v / sqrt(1 + |v|^2)`. Neither stretches anything, so `W` of a 2-norm below one makes a
contraction. The truth treats a complex number as two real ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Kind:
    """What of a map is static.

    **Attributes:**

    - `form`: How it is written: `dense`, `sparse`, or `tree` for a state of leaves.
    """

    form: str
    dtype: Any
    size: int

    @property
    def eps(self) -> float:
        return float(jnp.finfo(self.dtype).eps)

    @property
    def is_complex(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.complexfloating)

    @property
    def num_weights(self) -> int:
        return 3 * self.size if self.form == "sparse" else self.size**2

    def state(self, flat):
        """The state in the form of the map."""
        if self.form != "tree":
            return flat
        half = self.size // 2
        return {"a": (flat[:half], None), "b": flat[half:].reshape(1, -1, 1)}

    def flat(self, y):
        if self.form != "tree":
            return y
        return jnp.concatenate([y["a"][0], y["b"].reshape(-1)])

    def fn(self, y, args):
        """The map."""
        weights, (rows, cols), x = args
        y = self.flat(y)
        if self.form == "sparse":
            products = jnp.zeros_like(y).at[rows].add(weights * y[cols])
        else:
            products = weights.reshape(self.size, self.size) @ y
        v = products + x
        if not self.is_complex:
            return self.state(jnp.tanh(v))
        return self.state(v / jnp.sqrt(1 + v.real**2 + v.imag**2).astype(v.dtype))


@dataclasses.dataclass
class Map:
    """A map by its numbers, which are those of its dtype."""

    kind: Kind
    weights: np.ndarray
    places: np.ndarray
    x: np.ndarray

    @property
    def args(self):
        return self.weights, self.places, self.x


def draw(kind: Kind, rng: np.random.Generator, gain: float, scale: float) -> Map:
    """A map of 2-norm `gain`, with an input of the size `scale`."""
    n, m = kind.size, kind.num_weights

    def normal(num):
        out = rng.normal(size=num)
        return out + 1j * rng.normal(size=num) if kind.is_complex else out

    if kind.form == "sparse":
        places = rng.integers(0, max(n, 1), (2, m))
    else:
        places = np.indices((n, n)).reshape(2, m)
    weights = normal(m)
    size = np.linalg.norm(_matrix(kind, weights, places), 2) if n else 1.0
    cast = lambda a: np.asarray(a).astype(kind.dtype)
    weights = cast(gain * weights / max(size, 1e-3))
    return Map(kind, weights, places, cast(scale * normal(n)))


def _matrix(kind: Kind, weights, places) -> Any:
    out = np.zeros((kind.size, kind.size), weights.dtype)
    np.add.at(out, tuple(places), weights)
    return out


def wide(kind: Kind, a) -> Any:
    return np.asarray(a).astype(complex if kind.is_complex else float)


def to_real(kind: Kind, a) -> Any:
    """A vector of real numbers, with twice as many for complex ones."""
    a = wide(kind, a)
    return np.concatenate([a.real, a.imag]) if kind.is_complex else a


class Truth:
    """A map in double precision, by real numbers alone."""

    def __init__(self, problem: Map):
        self.kind = kind = problem.kind
        w = _matrix(kind, wide(kind, problem.weights), problem.places)
        if kind.is_complex:
            w = np.block([[w.real, -w.imag], [w.imag, w.real]])
        self.w, self.x = w, to_real(kind, problem.x)
        # Of a sparse one entries at one place add up, and may cancel.
        terms = _matrix(kind, np.abs(wide(kind, problem.weights)), problem.places)
        terms = np.asarray(terms, float)
        self.terms = np.tile(terms, (2, 2)) if kind.is_complex else terms
        self.places = problem.places
        self.gain = float(np.linalg.norm(w, 2)) if w.size else 0.0
        # Sums in half precision are taken in single; those of a scatter are not.
        is_half = kind.eps > 1e-4 and kind.form != "sparse"
        self.num_terms = 1 if is_half else int(np.max(np.sum(w != 0, 1), initial=0))

    def __call__(self, y):
        v = self.w @ y + self.x
        if not self.kind.is_complex:
            return np.tanh(v)
        return v / self._length(v)

    def _length(self, v):
        a, b = np.split(v, 2)
        return np.tile(np.sqrt(1 + a**2 + b**2), 2)

    def slope(self, y):
        """The Jacobian of `squash`."""
        v = self.w @ y + self.x
        if not self.kind.is_complex:
            return np.diag(1 - np.tanh(v) ** 2)
        length = self._length(v)
        a, b = np.split(v, 2)
        outer = np.block([[np.diag(p * q) for q in (a, b)] for p in (a, b)])
        return np.diag(1 / length) - outer / length[:, None] ** 3

    def rounding(self, y) -> float:
        """How far off an evaluation at `y` may be in the dtype."""
        size = self.terms @ np.abs(y) + np.abs(self.x) + np.abs(y)
        relative = self.kind.eps * float(np.max(size, initial=0))
        # Next to zero numbers are as far apart as there.
        least = float(jnp.finfo(self.kind.dtype).smallest_subnormal)
        return (self.num_terms + 8) * (relative + least)

    @property
    def is_noisy(self) -> bool:
        """Whether rounding keeps an adjoint from the residual that is asked for."""
        size = np.max(np.sum(self.terms, axis=1), initial=0)
        noise = (self.num_terms + 8) * self.kind.eps * float(size)
        return noise > max(1e-3, 32 * self.kind.eps)

    def solve(self):
        """The fixed point: plain steps, then Newton's. For contractions."""
        y = np.zeros_like(self.x)
        for _ in range(200):
            y = self(y)
        for _ in range(8):
            y = y + np.linalg.solve(self._system(y), self(y) - y)
        return y

    def _system(self, y):
        return np.eye(y.size) - self.slope(y) @ self.w

    def has_derivative(self, value) -> bool:
        return np.linalg.det(self._system(to_real(self.kind, value))) != 0

    def inverse(self, y):
        return np.linalg.inv(self._system(y))

    def gradient(self, y, u):
        """By `x` and by the weights, of a loss with the adjoint `u` at `y`."""
        g = self.slope(y).T @ u
        if self.kind.is_complex:  # By JAX's convention.
            g, y = (np.split(v, 2) for v in (g, y))
            g, y = g[0] - 1j * g[1], y[0] + 1j * y[1]
        rows, cols = self.places
        return g, g[rows] * y[cols]

    def tangent(self, y, d_weights, d_x):
        """Of `fn` in its arguments."""
        wide_y = y
        if self.kind.is_complex:
            wide_y = np.split(y, 2)[0] + 1j * np.split(y, 2)[1]
        moved = wide(self.kind, d_x).copy()
        rows, cols = self.places
        np.add.at(moved, rows, wide(self.kind, d_weights) * wide_y[cols])
        return self.slope(y) @ to_real(self.kind, moved)


def as_batch(problems: list[Map]):
    """The `args` of all, stacked."""
    return jax.tree.map(
        lambda *a: jnp.asarray(np.stack(a)), *[p.args for p in problems]
    )
