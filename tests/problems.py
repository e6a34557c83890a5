"""Fixed-point problems with known answers, for tests and benchmarks.

Every reference is a closed form, a dense solve or Newton's method in float64 NumPy:
nothing of the library is in it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.special as jsp
import numpy as np
from jax.flatten_util import ravel_pytree

from .helpers import newton, tanh_cell


@dataclasses.dataclass(frozen=True)
class Problem:
    """Find `y` with `fn(y, args) == y`.

    **Attributes:**

    - `expected`: The solution in float64, of the structure of `y0`.
    - `contracts`: Whether the plain iteration gets there from `y0`.
    """

    fn: Callable[[Any, Any], Any]
    y0: Any
    args: Any
    expected: Any
    contracts: bool = True

    @property
    def rounding(self) -> float:
        """The relative spacing of numbers in the coarsest leaf of `y0`."""
        leaves = jax.tree.leaves(self.y0)
        return max(float(jnp.finfo(jnp.asarray(x).dtype).eps) for x in leaves)


def error(problem: Problem, value) -> float:
    """The largest difference between `value` and the solution."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(problem.expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b))) for a, b in pairs)


def amplification(problem: Problem) -> float:
    """How much larger than its residual the error of an iterate near the solution is.

    The maximum norm of `(I - J)^-1` at the solution, in real and imaginary parts.
    """
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, problem.expected))
    is_complex = jnp.iscomplexobj(flat)
    args = jax.tree.map(_widen, problem.args)

    def split(y):
        y = ravel_pytree(y)[0]
        return jnp.concatenate([y.real, y.imag]) if is_complex else y

    def fn(x):
        half = x.size // 2
        y = unravel(jax.lax.complex(x[:half], x[half:]) if is_complex else x)
        return split(problem.fn(y, args))

    jacobian = np.asarray(jax.jacfwd(fn)(split(unravel(flat))))
    inverse = np.linalg.inv(np.eye(len(jacobian)) - jacobian)
    return float(np.max(np.sum(np.abs(inverse), axis=1)))


def _widen(x):
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x
    wide = jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64
    return jnp.asarray(x, wide)


def _affine(y, args):
    a, b = args
    return a @ y + b


def _linear(a, b, **kwargs) -> Problem:
    expected = np.linalg.solve(np.eye(len(b)) - np.asarray(a), np.asarray(b))
    return Problem(_affine, jnp.zeros(len(b)), (a, b), expected, **kwargs)


def _symmetric(key, spectrum) -> Problem:
    q_key, b_key = jr.split(key)
    size = len(spectrum)
    q, _ = jnp.linalg.qr(jr.normal(q_key, (size, size)))
    return _linear((q * spectrum[None]) @ q.T, jr.normal(b_key, (size,)))


def _expanding(key) -> Problem:
    """Eigenvalues below minus one: the plain iteration diverges."""
    problem = _symmetric(key, jnp.concatenate([jnp.array([-4.0, -1.5]), jnp.zeros(8)]))
    return dataclasses.replace(problem, contracts=False)


def _non_normal(key) -> Problem:
    """Spectral radius 0.5, but the residual grows before it falls."""
    size = 8
    a = 0.5 * jnp.eye(size) + jnp.eye(size, k=1)
    return _linear(a, jr.normal(key, (size,)))


def _cosine(key) -> Problem:
    del key
    expected = np.full(3, 0.7390851332151607)
    return Problem(lambda y, _: jnp.cos(y), jnp.array([0.0, 1.0, 2.0]), None, expected)


def _kepler(key) -> Problem:
    """Kepler's equation, `E = M + e sin(E)`, for some eccentricities."""
    anomaly = jr.uniform(key, (20,), minval=0.0, maxval=3.0)
    eccentricity = jnp.linspace(0.01, 0.9, 20)
    m, e = np.asarray(anomaly), np.asarray(eccentricity)
    expected = np.full(20, np.pi)  # From where Newton's method converges for all.
    for _ in range(60):
        step = (expected - m - e * np.sin(expected)) / (1 - e * np.cos(expected))
        expected = expected - step
    fn = lambda y, args: args[0] + args[1] * jnp.sin(y)
    return Problem(fn, anomaly, (anomaly, eccentricity), expected)


def _tanh(key, size: int, gain: float) -> Problem:
    """A cell with a symmetric weight, and an input too small to saturate it."""
    w_key, x_key = jr.split(key)
    w = jr.normal(w_key, (size, size))
    w = w + w.T
    w = gain * w / jnp.linalg.norm(w, ord=2)
    args = (w, 0.03 * jr.normal(x_key, (size,)))
    expected = newton(tanh_cell, jnp.zeros(size), args)
    return Problem(tanh_cell, jnp.zeros(size), args, np.asarray(expected))


def _self_consistent_field(key) -> Problem:
    """Densities in the field that they make, as in Hartree's equations."""
    size = 16
    grid = jnp.linspace(-1, 1, size)
    kernel = jnp.exp(-((grid[:, None] - grid[None]) ** 2) / 0.1)
    potential = 2 * grid**2 + 0.3 * jr.normal(key, (size,))
    args = (potential, 4 * kernel)
    fn = lambda y, args: jax.nn.softmax(-(args[0] + args[1] @ y))
    start = jnp.full(size, 1 / size)
    return Problem(fn, start, args, np.asarray(newton(fn, start, args)))


def _sinkhorn(key) -> Problem:
    """Scaling a matrix to given sums of rows and columns, in logarithms."""
    a_key, b_key, c_key = jr.split(key, 3)
    log_a = jax.nn.log_softmax(0.3 * jr.normal(a_key, (6,)))
    log_b = jax.nn.log_softmax(0.3 * jr.normal(b_key, (8,)))
    log_k = -4 * jr.uniform(c_key, (6, 8))

    def fn(y, args):
        log_a, log_b, log_k = args
        other = log_b - jsp.logsumexp(log_k + y[:, None], axis=0)
        new = log_a - jsp.logsumexp(log_k + other[None], axis=1)
        return new - jnp.mean(new)  # A constant is free.

    a, b, k = (np.exp(np.asarray(x)) for x in (log_a, log_b, log_k))
    u = np.ones(6)
    for _ in range(5000):
        u = a / (k @ (b / (k.T @ u)))
    expected = np.log(u) - np.mean(np.log(u))
    return Problem(fn, jnp.zeros(6), (log_a, log_b, log_k), expected)


def _value_iteration(key) -> Problem:
    """A Markov decision process with a discount of 0.9, by policy iteration."""
    r_key, p_key = jr.split(key)
    rewards = jr.normal(r_key, (3, 10))
    moves = jax.nn.softmax(3 * jr.normal(p_key, (3, 10, 10)))
    fn = lambda y, args: jnp.max(args[0] + 0.9 * args[1] @ y, axis=0)
    r, p, policy = np.asarray(rewards), np.asarray(moves), np.zeros(10, int)
    value = np.zeros(10)
    for _ in range(100):
        rows = np.arange(10)
        value = np.linalg.solve(np.eye(10) - 0.9 * p[policy, rows], r[policy, rows])
        policy = np.argmax(r + 0.9 * p @ value, axis=0)
    return Problem(fn, jnp.zeros(10), (rewards, moves), value)


def _discrete_choice(key) -> Problem:
    """Mean utilities from market shares, with consumers of several kinds."""
    taste_key, utility_key = jr.split(key)
    tastes = 0.8 * jr.normal(taste_key, (7, 5))
    utilities = 0.5 * jr.normal(utility_key, (5,))

    def shares(y, tastes):
        weights = jnp.exp(y[None] + tastes)
        return jnp.mean(weights / (1 + weights.sum(1, keepdims=True)), axis=0)

    log_shares = jnp.log(shares(utilities, tastes))
    fn = lambda y, args: y + args[0] - jnp.log(shares(y, args[1]))
    return Problem(fn, jnp.zeros(5), (log_shares, tastes), np.asarray(utilities))


def _poisson(key) -> Problem:
    """Poisson's equation in one dimension, by Jacobi's iteration."""
    size = 12
    a = 0.5 * (jnp.eye(size, k=1) + jnp.eye(size, k=-1))
    return _linear(a, 0.01 * jr.normal(key, (size,)))


def _chandrasekhar(key) -> Problem:
    """Chandrasekhar's H-equation with an albedo of 0.9, midpoint rule."""
    del key
    size = 20
    mu = (jnp.arange(0.0, size) + 0.5) / size
    kernel = 0.45 / size * mu[:, None] / (mu[:, None] + mu[None])
    fn = lambda y, kernel: 1 / (1 - kernel @ y)
    start = jnp.ones(size)
    return Problem(fn, start, kernel, np.asarray(newton(fn, start, kernel)))


def _pagerank(key) -> Problem:
    links = jr.bernoulli(key, 0.2, (30, 30)).astype(jnp.float64) + jnp.eye(30)
    a = 0.85 * links / links.sum(0, keepdims=True)
    return _linear(a, jnp.full(30, 0.15 / 30))


def _mixed_tree(key) -> Problem:
    """Leaves of several shapes and dtypes that depend on each other."""
    del key

    def fn(y, args):
        pull = jnp.mean(y["wide"]).astype(y["low"].dtype)
        low = 0.4 * y["low"] + 0.2 * pull + jnp.asarray(1.0, y["low"].dtype)
        return {"wide": 0.5 * y["wide"] + 0.1 * y["low"].astype(args.dtype), "low": low}

    # wide = 0.2 low, low = 0.4 low + 0.04 low + 1.
    low = 1 / 0.56
    expected = {"wide": np.full((2, 3), 0.2 * low), "low": np.asarray(low)}
    y0 = {"wide": jnp.zeros((2, 3)), "low": jnp.zeros((), jnp.float32)}
    return Problem(fn, y0, jnp.ones(()), expected)


def _complex(key) -> Problem:
    c = 0.4 * jr.normal(key, (4,), jnp.complex128)
    fn = lambda y, c: 0.5 * jnp.exp(1j * y) + c
    expected, shift = np.zeros(4, complex), np.asarray(c)
    for _ in range(200):
        image = 0.5 * np.exp(1j * expected)
        expected = expected - (expected - image - shift) / (1 - 1j * image)
    return Problem(fn, 0 * c, c, expected)


_makers: dict[str, Callable] = {
    "linear_0.5": lambda key: _symmetric(key, jnp.linspace(-0.5, 0.5, 10)),
    "linear_0.9": lambda key: _symmetric(key, jnp.linspace(-0.9, 0.9, 20)),
    "linear_0.99": lambda key: _symmetric(key, jnp.linspace(-0.5, 0.99, 20)),
    "linear_0.999": lambda key: _symmetric(key, jnp.linspace(0.0, 0.999, 10)),
    "expanding": _expanding,
    "non_normal": _non_normal,
    "cosine": _cosine,
    "kepler": _kepler,
    "tanh_10_0.3": lambda key: _tanh(key, 10, 0.3),
    "tanh_100_0.9": lambda key: _tanh(key, 100, 0.9),
    "tanh_300_0.99": lambda key: _tanh(key, 300, 0.99),
    "self_consistent_field": _self_consistent_field,
    "sinkhorn": _sinkhorn,
    "value_iteration": _value_iteration,
    "discrete_choice": _discrete_choice,
    "poisson": _poisson,
    "chandrasekhar": _chandrasekhar,
    "pagerank": _pagerank,
    "mixed_tree": _mixed_tree,
    "complex": _complex,
}
NAMES = tuple(_makers)


def make(name: str) -> Problem:
    """The problem `name`, always the same. Needs JAX's 64-bit types."""
    return _makers[name](jr.key(NAMES.index(name)))
