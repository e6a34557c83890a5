from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._adjoint import AbstractAdjoint, AbstractImplicitAdjoint, AdjointMonitor
from .._batching import AbstractBatching
from .._check import check_instance, check_integer
from .._fixed_point import fixed_point
from .._solution import Solution
from .._solve_adjoint import solve_adjoint
from .._solver import AbstractFixedPointSolver
from .monotone_map import AbstractMonotoneMap
from .proximal import check_activation
from .splitting import AbstractSplitting


def _step(y, args):
    split, u = args
    return split.step(y, u)


def _check_shape(name: str, value: Array, u: Array):
    if jnp.shape(value) != u.shape:
        raise ValueError(
            f"`{name}` must have the shape {u.shape} of the state; got "
            f"{jnp.shape(value)}."
        )


class MonotoneSolve(eqx.Module):
    r"""How $z = \sigma(W z + u)$ is solved, but for $W$ and $u$."""

    splitting: AbstractSplitting
    solver: AbstractFixedPointSolver
    activation: Callable[[Array], Array]
    adjoint: AbstractAdjoint
    batching: AbstractBatching
    max_steps: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)

    def check(self):
        check_instance("splitting", self.splitting, AbstractSplitting)
        check_instance("solver", self.solver, AbstractFixedPointSolver)
        check_activation(self.activation)
        check_instance("adjoint", self.adjoint, AbstractAdjoint)
        check_instance("batching", self.batching, AbstractBatching)
        check_integer("max_steps", self.max_steps, 1)
        check_instance("throw", self.throw, bool)

    def __call__(
        self,
        map: AbstractMonotoneMap,
        u: Float[Array, "..."],
        z0: Float[Array, "..."] | None,
        state: PyTree[Any],
        monitor: AdjointMonitor | None,
    ) -> Solution:
        """The solution, in terms of `z`."""
        if z0 is None:
            z0 = jnp.zeros_like(u)
        _check_shape("z0", z0, u)
        split = self.splitting.split(map, self.activation)
        sol = fixed_point(
            _step,
            self.solver,
            split.start(jnp.asarray(z0, u.dtype), u),
            (split, u),
            max_steps=self.max_steps,
            adjoint=self.adjoint,
            batching=self.batching,
            throw=self.throw,
            state=state,
            monitor=monitor,
        )
        return eqx.tree_at(lambda sol: sol.value, sol, split.value(sol.value))

    def solve_adjoint(
        self,
        map: AbstractMonotoneMap,
        u: Float[Array, "..."],
        z: Float[Array, "..."],
        cotangent: Float[Array, "..."],
        state: PyTree[Any],
    ) -> Solution:
        """The linear solve of the backward pass, in terms of the splitting."""
        if not isinstance(self.adjoint, AbstractImplicitAdjoint):
            raise TypeError(
                f"`adjoint={type(self.adjoint).__name__}` has no linear solve in its "
                "backward pass."
            )
        _check_shape("z", z, u)
        _check_shape("cotangent", cotangent, u)
        split = self.splitting.split(map, self.activation)
        y = split.start(jnp.asarray(z, u.dtype), u)
        (cotangent,) = jax.vjp(split.value, y)[1](jnp.asarray(cotangent, y.dtype))
        return solve_adjoint(
            _step,
            self.solver,
            y,
            cotangent,
            (split, u),
            adjoint=self.adjoint,
            batching=self.batching,
            throw=self.throw,
            state=state,
        )
