from typing import Any, Generic

import equinox as eqx
from jaxtyping import PyTree, Scalar

from .._custom_types import BoolScalar, IntScalar, Y
from .._solution import RESULTS


class Progress(eqx.Module, Generic[Y]):
    """How far a solve has come: the carry of its loop."""

    y: Y
    state: PyTree[Any]
    result: RESULTS
    is_live: BoolScalar
    num_steps: IntScalar
    num_fn_evals: IntScalar
    residual: Scalar
    first_residual: Scalar
    best_residual: Scalar
    best_step: IntScalar
    best_y: Y
    is_trial: BoolScalar
    is_last: BoolScalar
