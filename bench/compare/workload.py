"""A workload: a cell and its inputs, its solutions and gradients to the last digits."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import truth


Tree = Any

# For states in single and in double precision.
SINGLE = tuple(10 ** (-k / 2) for k in range(3, 17))
DOUBLE = tuple(10 ** (-k / 2) for k in range(11, 29))


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Solve `z = cell(z, (params, x))` for each `x`.

    The loss is the inner product of the solutions with `cts`, unless it has a head of
    its own, and its gradient that in `params` and in the inputs.

    **Attributes:**

    - `target`: The relative error that a solution of each sample, and both gradients,
        may have.
    - `max_steps`: The most steps that anyone may take.
    - `is_dense`: Whether the Jacobian of one sample is small.
    - `is_single`: Whether it is one sample, with no axis of samples.
    - `start`: Where to begin, if not at zero.
    - `solutions`: In float64, where they are known without a solve.
    - `head`: `(zs, params)` to a loss, if it is not linear.
    - `torch_cell`: The name of the cell in `torch_cells.py`, if it is there.
    - `labels`: What a head for classes compares with.
    - `update`, `memory`: A step of an optimiser, `(params, grads, memory)` to new
        parameters and a new memory, and that at the start.
    - `dtype`: That of all arrays; `None` leaves them as they are, in double precision.
    - `tolerances`: Those to try, the coarsest first.
    """

    name: str
    what: str
    cell: Callable[[Any, Any], Any]
    params: Tree
    xs: Tree
    cts: Tree
    target: float = 1e-4
    max_steps: int = 500
    is_dense: bool = True
    is_single: bool = False
    start: Tree = None
    solutions: Tree = None
    head: Callable[[Any, Any], jax.Array] | None = None
    torch_cell: str = ""
    labels: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int32)
    )
    update: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None
    memory: Tree = None
    dtype: Any = np.float32
    tolerances: tuple[float, ...] = SINGLE

    @property
    def num_samples(self) -> int:
        return 1 if self.is_single else len(jax.tree.leaves(self.cts)[0])

    @property
    def has_gradient(self) -> bool:
        """Whether there is anything that the solutions depend on."""
        return any(np.any(g) for g in self.truth[1])

    def precision(self):
        """A context: JAX's 64-bit types where the workload has them."""
        return jax.enable_x64(self.dtype is None)

    def arrays(self, dtype: Any = None) -> tuple[Tree, Tree]:
        dtype = self.dtype if dtype is None else dtype
        cast = lambda x: jnp.asarray(x, None if np.iscomplexobj(x) else dtype)
        return jax.tree.map(cast, self.params), jax.tree.map(cast, self.xs)

    def whole(self, zs: Tree, args: tuple[Tree, Tree]) -> Tree:
        """The cell of the whole batch."""
        params, xs = args
        if self.is_single:
            return self.cell(zs, args)
        return jax.vmap(lambda z, x: self.cell(z, (params, x)))(zs, xs)

    def starts(self, dtype: Any = None) -> Tree:
        if self.start is not None:
            return self.start
        dtype = self.dtype if dtype is None else dtype
        return jax.tree.map(lambda ct: jnp.zeros(ct.shape, dtype), self.cts)

    def loss(self, zs: Tree, params: Tree) -> jax.Array:
        if self.head is not None:
            return self.head(zs, params)
        product = lambda z, ct: jnp.sum(jnp.real(z * ct.astype(z.dtype)))
        parts = jax.tree.leaves(jax.tree.map(product, zs, self.cts))
        return ft.reduce(lambda a, b: a + b.astype(a.dtype), parts)

    @ft.cached_property
    def truth(self) -> tuple[Tree, list[np.ndarray]]:
        """The solutions, and the leaves of the gradient."""
        with jax.enable_x64(True):
            args = self.arrays(np.float64)
            zs = self.solutions
            if zs is None:
                zs = truth.solutions(self, args)
            zs = jax.tree.map(jnp.asarray, zs)
            cts, direct = jax.grad(self.loss, (0, 1))(zs, args[0])
            us = truth.adjoints(self, args, zs, cts)
            _, transposed = jax.vjp(lambda args: self.whole(zs, args), args)
            of_params, of_xs = transposed(us)[0]
            of_params = jax.tree.map(jnp.add, of_params, direct)
            leaves = jax.tree.leaves((of_params, of_xs))
            return jax.tree.map(np.asarray, zs), [np.asarray(x) for x in leaves]

    def _rows(self, zs: Tree) -> np.ndarray:
        leaves = [_wide(z) for z in jax.tree.leaves(zs)]
        shape = (self.num_samples, -1)
        return np.concatenate([z.reshape(shape) for z in leaves], axis=1)

    def value_error(self, zs: Tree) -> float:
        """That of the worst sample."""
        got, true = self._rows(zs), self._rows(self.truth[0])
        with np.errstate(all="ignore"):  # What diverges overflows.
            errors = np.linalg.norm(got - true, axis=1) / np.linalg.norm(true, axis=1)
        return _or_infinite(np.max(errors))

    def gradient_error(self, grads: Tree) -> float:
        """The larger of that of all parameters and that of all inputs."""
        got = [_wide(g) for g in jax.tree.leaves(grads)]
        num, true = len(jax.tree.leaves(self.params)), self.truth[1]
        pairs = list(zip(got, true, strict=True))
        size = lambda leaves: np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in leaves))
        with np.errstate(all="ignore"):
            errors = [
                size([a - b for a, b in part]) / size([b for _, b in part])
                for part in (pairs[:num], pairs[num:])
                if any(np.any(b) for _, b in part)
            ]
        return _or_infinite(max(errors))


def _wide(x) -> np.ndarray:
    return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def _or_infinite(x: float) -> float:
    return float(x) if np.isfinite(x) else np.inf
