import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import BoolScalar
from .._solution import RESULTS


_FAILURES = (
    (
        RESULTS.max_steps_reached,
        "it reached its `max_steps`. Raise that of the `linear_solver`, or take one "
        "that accelerates",
    ),
    (
        RESULTS.stagnation,
        "its residual stopped falling. The system may be singular, or nearly so",
    ),
    (
        RESULTS.divergence,
        "it diverged. The Jacobian of `fn` does not contract at the solution; take a "
        "direct solver such as `lineax.LU()`",
    ),
    (
        RESULTS.singular,
        "the system is singular, or nearly so. The fixed point may not be an isolated "
        "one, and then has no derivative",
    ),
    (
        RESULTS.nonfinite,
        "the Jacobian of `fn` at the solution, or the cotangent, is not finite",
    ),
)


def checked(
    value: PyTree[Array], result: RESULTS, is_usable: BoolScalar, throw: bool
) -> PyTree[Array]:
    """A linear solve that failed raises, or becomes NaN: never silently wrong."""
    if not throw:
        return jtu.tree_map(lambda x: jnp.where(is_usable, x, jnp.nan), value)
    index = jnp.zeros((), jnp.int32)
    for i, (failure, _) in enumerate(_FAILURES):
        index = jnp.where(result == failure, jnp.int32(i + 1), index)
    reasons = ["its `linear_solver` broke down", *(reason for _, reason in _FAILURES)]
    messages = [
        f"The linear solve of a derivative failed: {reason}. `throw=False` gives a "
        "derivative of NaN in place of this error."
        for reason in reasons
    ]
    return eqx.branched_error_if(value, ~is_usable, index, messages)
