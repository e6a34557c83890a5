import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._check import check_instance
from .._custom_types import Y
from .._dtype import residual_dtype
from .._misc import tree_where
from .base import AbstractFixedPointSolver
from .wrapper import AbstractWrapper


class _BestSoFarState(eqx.Module):
    solver_state: PyTree[Any]
    y: PyTree[Array]
    residual: Scalar


class BestSoFar(AbstractWrapper[Y, _BestSoFarState]):
    r"""Return the iterate of the smallest residual, whatever ended the solve.

    Every failed solve returns that, but for one that `nonfinite` ended: the value is
    then the last iterate, at which `fn` is infinite or not a number. With this around
    the solver it is the best iterate there too. All else is as without it.

    Use it where a failed solve is used all the same. Cost: no evaluation of `fn`.
    Memory: one `y`.
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
        inf = jnp.array(jnp.inf, residual_dtype(y))
        return _BestSoFarState(
            self.solver.init(y, max_steps=max_steps, state=old), y, inf
        )

    def step(self, fn, at, args, state):
        step = self.solver.step(fn, at, args, state.solver_state)
        is_best = at.is_live & (at.residual <= state.residual)
        y, residual = tree_where(
            is_best, (at.y, at.residual), (state.y, state.residual)
        )
        return dataclasses.replace(step, state=_BestSoFarState(step.state, y, residual))

    def postprocess(self, y, residual, is_successful, state):
        y, residual, stats = self.solver.postprocess(
            y, residual, is_successful, state.solver_state
        )
        # Where no residual was ever finite there is no best, and the start is as good
        # as anything.
        y, residual = tree_where(
            is_successful | jnp.isinf(state.residual),
            (y, residual),
            (state.y, state.residual),
        )
        return y, residual, stats
