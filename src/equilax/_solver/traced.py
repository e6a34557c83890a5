import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._check import check_instance
from .._custom_types import Y
from .._dtype import residual_dtype
from .base import AbstractFixedPointSolver
from .wrapper import AbstractWrapper


class _TracedState(eqx.Module):
    solver_state: PyTree[Any]
    trace: Float[Array, " num"]


class Traced(AbstractWrapper[Y, _TracedState]):
    r"""Record the residual of every iterate.

    Adds `trace` to `stats`: `max_steps + 1` numbers in the units of `y`, the solver's
    norm of $f(y_k) - y_k$ for $k = 0, 1, \dots$ up to the value returned, and NaN after
    it. Plotting libraries leave NaN out.

    Use it to look at a solve. Cost: no evaluation of `fn`. Memory: `max_steps + 1`
    scalars.
    """

    solver: AbstractFixedPointSolver

    def __init__(self, solver: AbstractFixedPointSolver):
        """**Arguments:**

        - `solver`: The solver to wrap. Its tolerances and norm are those of the whole.
        """
        check_instance("solver", solver, AbstractFixedPointSolver)
        self.solver = solver

    def init(self, y, *, max_steps, state=None):
        old = None if state is None else state.solver_state
        trace = jnp.full((max_steps + 1,), jnp.nan, residual_dtype(y))
        return _TracedState(self.solver.init(y, max_steps=max_steps, state=old), trace)

    def step(self, fn, at, args, state):
        step = self.solver.step(fn, at, args, state.solver_state)
        k = at.num_steps
        old = lax.dynamic_index_in_dim(state.trace, k, 0, keepdims=False)
        new = jnp.where(at.is_live, at.residual, old)
        trace = lax.dynamic_update_index_in_dim(state.trace, new, k, 0)
        return dataclasses.replace(step, state=_TracedState(step.state, trace))

    def postprocess(self, y, residual, is_successful, state):
        y, residual, stats = self.solver.postprocess(
            y, residual, is_successful, state.solver_state
        )
        return y, residual, {**stats, "trace": state.trace}
