import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import BoolScalar
from .._failure import Kind, raise_if_failed
from .._solution import RESULTS


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
        "It diverged. The Jacobian of `fn` does not contract at the solution; take a "
        "direct solver such as `lineax.LU()`.",
    ),
    Kind(
        "singular",
        "The system is singular, or nearly so. The fixed point may not be an isolated "
        "one, and then has no derivative.",
    ),
    Kind(
        "nonfinite",
        "The Jacobian of `fn` at the solution, or the cotangent, is not finite.",
    ),
    Kind("breakdown", "Its `linear_solver` broke down."),
)


def checked(
    value: PyTree[Array], result: RESULTS, is_usable: BoolScalar, throw: bool
) -> PyTree[Array]:
    """A linear solve that failed raises, or becomes NaN: never silently wrong."""
    if not throw:
        return jtu.tree_map(lambda x: jnp.where(is_usable, x, jnp.nan), value)
    return raise_if_failed(
        value,
        result,
        ~is_usable,
        subject="The linear solve of a derivative",
        kinds=_KINDS,
        advice="`throw=False` gives a derivative of NaN in place of this error.",
    )
