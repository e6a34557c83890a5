from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from .._misc import struct
from .base import AbstractFixedPointSolver


def check_solver_state(
    solver: AbstractFixedPointSolver,
    y0: PyTree[Array],
    state: PyTree[Any],
    max_steps: int,
    each: Callable,
):
    """Refuse a `state` that no solve by `solver` of a `y0` like this one ended in."""

    def init(y, state):
        return each(lambda y, s: solver.init(y, max_steps=max_steps, state=s))(y, state)

    expected = eqx.filter_eval_shape(init, y0, None)
    try:
        got = eqx.filter_eval_shape(init, y0, state)
    except (AttributeError, TypeError, ValueError):
        got = None
    if got is None or not eqx.tree_equal(struct(got), struct(expected)):
        raise ValueError(
            f"`state` must be the `Solution.state` of a solve by "
            f"`{type(solver).__name__}` with the same history and a `y0` of the same "
            f"shapes and dtypes; got a {type(state).__name__}."
        )
