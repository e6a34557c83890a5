import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._check import check_instance, check_integer
from .._custom_types import IntScalar, Y
from .base import AbstractFixedPointSolver
from .wrapper import AbstractWrapper


class UpTo(AbstractWrapper[Y, PyTree[Any]]):
    r"""Take at most `num_steps` steps, a number that may be traced.

    As a smaller `max_steps`, which is fixed when a program is compiled: a solve that
    would go on ends with `max_steps_reached`, or, with both tolerances zero, as a
    success. `max_steps` goes on to hold as well.

    Use it to train with a number of steps at random (Anil et al. 2022), as in
    `UpTo(solver, jax.random.randint(key, (), 8, 25))`, or with one that grows. Under
    `jax.vmap` each sample may have its own.

    Cost: no evaluation of `fn`, and none after the last step. Memory: none.
    """

    solver: AbstractFixedPointSolver
    num_steps: IntScalar | int

    def __init__(self, solver: AbstractFixedPointSolver, num_steps: IntScalar | int):
        """**Arguments:**

        - `solver`: The solver to wrap. Its tolerances and norm are those of the whole.
        - `num_steps`: The most steps, at least 1. May be a traced integer; of one below
            1 that cannot be read a step is taken all the same.
        """
        check_instance("solver", solver, AbstractFixedPointSolver)
        _check_steps(num_steps)
        self.solver = solver
        self.num_steps = num_steps

    def init(self, y, *, max_steps, state=None):
        return self.solver.init(y, max_steps=max_steps, state=state)

    def step(self, fn, at, args, state):
        step = self.solver.step(fn, at, args, state)
        is_last = at.num_steps + 1 >= jnp.asarray(self.num_steps, jnp.int32)
        return dataclasses.replace(step, is_last=step.is_last | is_last)

    def postprocess(self, y, residual, is_successful, state):
        return self.solver.postprocess(y, residual, is_successful, state)


def _check_steps(value: Any):
    """Refuse what is no number of steps, where it can be read."""
    if not eqx.is_array(value) or isinstance(value, np.ndarray):
        check_integer("num_steps", value, 1)
    elif value.shape != () or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            "`num_steps` must be one integer; got an array of "
            f"{value.dtype}{list(value.shape)}."
        )
