from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .._check import check_instance
from .._custom_types import Y
from .._dtype import residual_dtype
from .._misc import tree_where
from .base import AbstractFixedPointSolver


class _BestSoFarState(eqx.Module):
    solver_state: PyTree[Any]
    y: PyTree[Array]
    residual: Scalar


class BestSoFar(AbstractFixedPointSolver[Y, _BestSoFarState]):
    r"""Return the iterate of the smallest residual from a solve that fails.

    Without it the value of a failed solve is the last iterate. The iterates themselves
    are those of the solver inside, and so is the value of a solve that succeeds; the
    `residual` in `stats` is that of the value returned.

    Use it around a solver whose residual can rise, where a failed solve is used all the
    same. Cost: no evaluation of `fn`. Memory: one `y`.
    """

    solver: AbstractFixedPointSolver

    def __init__(self, solver: AbstractFixedPointSolver):
        """**Arguments:**

        - `solver`: The solver to wrap. Its tolerances and norm are those of the whole.
        """
        check_instance("solver", solver, AbstractFixedPointSolver)
        self.solver = solver

    @property
    def rtol(self):
        return self.solver.rtol

    @property
    def atol(self):
        return self.solver.atol

    @property
    def norm(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.solver.norm

    def init(self, y, *, max_steps):
        inf = jnp.array(jnp.inf, residual_dtype(y))
        return _BestSoFarState(self.solver.init(y, max_steps=max_steps), y, inf)

    def step(self, fn, at, args, state):
        new_y, solver_state, num = self.solver.step(fn, at, args, state.solver_state)
        is_best = at.is_live & (at.residual < state.residual)
        y, residual = tree_where(
            is_best, (at.y, at.residual), (state.y, state.residual)
        )
        return new_y, _BestSoFarState(solver_state, y, residual), num

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
