"""The cell of the gradient benchmarks, with its gradient to the last digits."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


SIZE, BATCH = 256, 64
# Small enough not to saturate the cell: the gain is then nearly its contraction factor.
INPUT_SCALE = 0.1


def _symmetric(matrix):
    return matrix + matrix.T


def _gaussian(matrix):
    return matrix


def _orthogonal(matrix):
    return np.linalg.qr(matrix)[0]


# Spectra on an interval, in a disc of half the gain, and on a circle. On the last no
# polynomial method gains anything on the plain iteration.
WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "symmetric": _symmetric,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
}


def cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


@dataclasses.dataclass(frozen=True)
class Case:
    """Solutions for a batch of inputs, and the gradient of a linear function of them.

    **Attributes:**

    - `inputs`: The weight, the inputs and the coefficients of the function.
    - `grads`: The gradient in the weight and in the inputs, in float64, by a direct
        solve for each sample.
    """

    inputs: tuple[np.ndarray, np.ndarray, np.ndarray]
    grads: tuple[np.ndarray, np.ndarray]

    def arrays(self, dtype) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(x, dtype) for x in self.inputs)

    def errors(self, grads) -> tuple[float, ...]:
        """Relative, in the Frobenius norm, of both gradients."""
        pairs = zip(grads, self.grads, strict=True)
        return tuple(
            float(np.linalg.norm(np.asarray(got, np.float64) - true))
            / float(np.linalg.norm(true))
            for got, true in pairs
        )


def make_case(gain: float, weight: str = "symmetric") -> Case:
    rng = np.random.default_rng(0)
    w = WEIGHTS[weight](rng.normal(size=(SIZE, SIZE)))
    w = gain * w / np.linalg.norm(w, ord=2)
    xs = INPUT_SCALE * rng.normal(size=(BATCH, SIZE))
    cts = rng.normal(size=(BATCH, SIZE))
    zs = _solutions(w, xs)
    slopes = 1 - zs**2
    transposed = np.swapaxes(_systems(w, slopes), 1, 2)
    adjoints = slopes * np.linalg.solve(transposed, cts[..., None])[..., 0]
    return Case((w, xs, cts), (adjoints.T @ zs, adjoints))


def _systems(w, slopes):
    """`I - J` for each sample."""
    return np.eye(SIZE) - slopes[..., None] * w


def _solutions(w, xs):
    zs = np.zeros_like(xs)
    for _ in range(100):
        zs = np.tanh(zs @ w.T + xs)
    for _ in range(6):  # Newton's.
        fs = np.tanh(zs @ w.T + xs)
        steps = np.linalg.solve(_systems(w, 1 - fs**2), (fs - zs)[..., None])
        zs = zs + steps[..., 0]
    assert np.max(np.abs(np.tanh(zs @ w.T + xs) - zs)) < 1e-14
    return zs


def loss(solve: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The linear function of the solutions, from a `solve(w, xs)`."""
    return lambda w, xs, cts: jnp.sum(cts * solve(w, xs))


def gradient_of(solve: Callable[..., jax.Array]) -> Callable:
    """The loss, and its gradient in the weight and the inputs."""
    return jax.value_and_grad(loss(solve), (0, 1))


def compiled(fn: Callable, args) -> tuple[Any, float]:
    """The executable, and the seconds to trace, lower and compile it anew."""
    jax.clear_caches()
    start = time.perf_counter()
    executable = jax.jit(fn).lower(*args).compile()
    return executable, time.perf_counter() - start
