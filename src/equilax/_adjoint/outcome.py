from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._custom_types import AxisName
from .._failure import Kind, raise_if_failed
from .._misc import per_sample, tree_allfinite
from .._solution import RESULTS
from .monitor import figures
from .on_failure import OnFailure


_KINDS = (
    Kind(
        "max_steps_reached",
        "It reached its `max_steps`. Raise that of the `linear_solver`, or take one "
        "that accelerates.",
    ),
    Kind(
        "stagnation",
        "Its residual stopped falling. The system may be singular, or nearly so.",
    ),
    Kind(
        "divergence",
        "It diverged. The Jacobian of `fn` does not contract at the solution; take "
        "`equilax.KrylovLinearSolver`, or a direct solver such as `lineax.LU()`.",
    ),
    Kind(
        "singular",
        "The system is singular, or so nearly that rounding decides. The fixed point "
        "may not be an isolated one, and then has no derivative. Otherwise, or if the "
        "parts of `y` are in units far apart, a wider dtype helps.",
    ),
    Kind(
        "nonfinite",
        "The Jacobian of `fn` at the solution, or the cotangent, is not finite.",
    ),
    Kind(
        "breakdown",
        "Its `linear_solver` broke down, or the samples of a `batch_axis` depend on "
        "each other: solve such as one problem, without a `batch_axis`.",
    ),
)


class Outcome(eqx.Module):
    """How the linear solve of a derivative ended.

    **Attributes:**

    - `value`: The solution.
    - `result`: How the solver says that it ended.
    - `is_usable`: Whether the value may be used.
    - `relative`: The norm of the residual, relative to that of the right-hand side.
    - `stats`: As those of an [`equilax.Solution`][].
    """

    value: PyTree[Array]
    result: RESULTS
    is_usable: Bool[Array, "..."]
    relative: Float[Array, "..."]
    stats: dict[str, Any]


def singular_where(is_singular: Bool[Array, ""], result: RESULTS) -> RESULTS:
    return RESULTS.where(is_singular, cast(RESULTS, RESULTS.singular), result)


def figures_of(outcome: Outcome, is_batch: bool) -> Float[Array, "4"]:
    """What a monitor is told of it."""
    is_failed = jnp.logical_not(outcome.is_usable)
    steps, relative = outcome.stats["num_steps"], outcome.relative
    return figures(steps, is_failed, relative, is_batch)


def checked(
    outcome: Outcome,
    *,
    throw: bool,
    on_failure: OnFailure,
    is_batch: bool,
    axis_name: AxisName,
) -> PyTree[Array]:
    """The value of a solve; one that failed raises, or meets with its policy."""
    if throw:
        return raise_if_failed(
            outcome.value,
            outcome.result,
            ~outcome.is_usable,
            subject="The linear solve of a derivative",
            kinds=_KINDS,
            advice="`throw=False` gives the derivative that the `on_failure` of the "
            "adjoint says, in place of this error.",
            num_steps=outcome.stats["num_steps"],
            residual=outcome.stats["residual"],
            is_batch=is_batch,
        )

    def settle(value, is_usable):
        if on_failure is OnFailure.keep:
            is_usable = is_usable | tree_allfinite(value, axis_name)
        other = jnp.nan if on_failure is OnFailure.nan else 0.0
        return jtu.tree_map(lambda x: jnp.where(is_usable, x, other), value)

    return per_sample(is_batch)(settle)(outcome.value, outcome.is_usable)
