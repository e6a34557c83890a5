"""A workload: a cell, its inputs, and its solutions and gradients to the last digits.

The truth is float64 and nothing of the library is in it: Newton's method with dense
Jacobians where the state is small, the plain iteration forward and backward where it is
large.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Solve `z = cell(z, (params, x))` for each `x`, from zero.

    The loss is the inner product of the solutions with `cts`, and its gradient that in
    `params` and in the inputs.

    **Attributes:**

    - `target`: The relative error that a solution of each sample, and both gradients,
        may have.
    - `max_steps`: The most steps that anyone may take.
    - `is_dense`: Whether the Jacobian of one sample is small.
    """

    name: str
    what: str
    cell: Callable[[Any, Any], Any]
    params: Tree
    xs: np.ndarray
    cts: np.ndarray
    target: float = 1e-4
    max_steps: int = 500
    is_dense: bool = True

    def arrays(self, dtype: Any = np.float32) -> tuple[Tree, jax.Array]:
        cast = lambda x: jnp.asarray(x, dtype)
        return jax.tree.map(cast, self.params), cast(self.xs)

    def whole(self, zs, args):
        """The cell of the whole batch."""
        params, xs = args
        one = lambda z, x: self.cell(z, (params, x))
        return jax.vmap(one)(zs, xs)

    def starts(self, xs: jax.Array) -> jax.Array:
        return jnp.zeros(self.cts.shape, xs.dtype)

    def loss(self, zs: jax.Array) -> jax.Array:
        return jnp.sum(zs * self.cts.astype(zs.dtype))

    @ft.cached_property
    def truth(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """The solutions, and the leaves of the gradient."""
        with jax.enable_x64(True):
            args = self.arrays(np.float64)
            zs = _dense_solutions(self, args) if self.is_dense else _settle(self, args)
            us = _dense_adjoints(self, args, zs) if self.is_dense else None
            us = _settle_back(self, args, zs) if us is None else us
            _, transposed = jax.vjp(lambda args: self.whole(zs, args), args)
            (grads,) = transposed(us)
            return np.asarray(zs), [np.asarray(g) for g in jax.tree.leaves(grads)]

    def value_error(self, zs) -> float:
        """That of the worst sample."""
        rows = lambda x: np.asarray(x, np.float64).reshape(len(self.xs), -1)
        got, true = rows(zs), rows(self.truth[0])
        errors = np.linalg.norm(got - true, axis=1) / np.linalg.norm(true, axis=1)
        return _or_infinite(np.max(errors))

    def gradient_error(self, grads: Tree) -> float:
        """The larger of that of all parameters and that of all inputs."""
        got = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
        size = lambda leaves: np.sqrt(sum(np.sum(np.square(x)) for x in leaves))
        errors = []
        for part in (slice(None, -1), slice(-1, None)):
            pairs = zip(got[part], self.truth[1][part], strict=True)
            errors.append(size([a - b for a, b in pairs]) / size(self.truth[1][part]))
        return _or_infinite(max(errors))


def _or_infinite(x: float) -> float:
    return float(x) if np.isfinite(x) else np.inf


def _rows(workload: Workload, args, zs):
    """The residual and the dense `I - J` of each sample."""
    params, xs = args
    shape, size = zs.shape[1:], zs[0].size

    def one(z, x):
        fn = lambda z: workload.cell(z.reshape(shape), (params, x)).reshape(size)
        return fn(z) - z, jnp.eye(size) - jax.jacfwd(fn)(z)

    return jax.vmap(one)(zs.reshape(len(zs), size), xs)


def _dense_solutions(workload: Workload, args):
    zs = workload.starts(args[1])
    zs = lax.fori_loop(0, 100, lambda _, zs: workload.whole(zs, args), zs)
    for _ in range(8):  # Newton's.
        residuals, systems = _rows(workload, args, zs)
        steps = jnp.linalg.solve(systems, residuals[..., None])[..., 0]
        zs = zs + steps.reshape(zs.shape)
    assert jnp.max(jnp.abs(workload.whole(zs, args) - zs)) < 1e-13
    return zs


def _dense_adjoints(workload: Workload, args, zs):
    _, systems = _rows(workload, args, zs)
    cts = jnp.asarray(workload.cts).reshape(len(zs), -1, 1)
    return jnp.linalg.solve(jnp.swapaxes(systems, 1, 2), cts).reshape(zs.shape)


def _iterate(fn, y, most: int):
    """Until a step moves nothing any more but the last digits."""

    def is_moving(carry):
        y, last, count = carry
        return (count < most) & (jnp.max(jnp.abs(y - last)) > 1e-14)

    step = lambda carry: (fn(carry[0]), carry[0], carry[2] + 1)
    y, last, _ = lax.while_loop(is_moving, step, (fn(y), y, 0))
    assert jnp.max(jnp.abs(y - last)) < 1e-11, "The plain iteration has not settled."
    return y


def _settle(workload: Workload, args):
    return _iterate(lambda z: workload.whole(z, args), workload.starts(args[1]), 20_000)


def _settle_back(workload: Workload, args, zs):
    _, transposed = jax.vjp(lambda zs: workload.whole(zs, args), zs)
    cts = jnp.asarray(workload.cts)
    return _iterate(lambda u: transposed(u)[0] + cts, jnp.zeros_like(zs), 20_000)
