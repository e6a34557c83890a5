"""What the two Newton methods share: a direction, and how far along it to go."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from .._custom_types import AxisName, BoolScalar, IntScalar, Y
from .._dtype import at_least_single, real, residual_dtype, rounding
from .._mesh import vary_over, varying
from .._misc import difference, struct, tree_allfinite, tree_where
from .._norm import two_norm
from .._ravel import raveller
from .base import Evaluation
from .line_search import AbstractLineSearch


_ROUNDING_UNITS = 8


class Descent(eqx.Module):
    """A step under way.

    **Attributes:**

    - `direction`: Where it goes.
    - `length`: How far, in multiples of the direction.
    - `start`: The two-norm of the residual where it began. In that norm an inexact
        solution of the linear system is a descent, which in others it need not be.
    - `num_shortened`: The trials taken back so far.
    """

    direction: PyTree[Array]
    length: Scalar
    start: Scalar
    num_shortened: IntScalar


def begin(y: PyTree[Array]) -> Descent:
    dtype = residual_dtype(y)
    wide = lambda x: jnp.zeros(x.shape, at_least_single(x.dtype))
    return Descent(
        direction=jtu.tree_map(wide, y),
        length=jnp.ones((), dtype),
        start=jnp.zeros((), dtype),
        num_shortened=jnp.zeros((), jnp.int32),
    )


def is_taken_back(
    search: AbstractLineSearch,
    at: Evaluation,
    size: Scalar,
    state: Descent,
    axis_name: AxisName,
) -> BoolScalar:
    """Whether the search refuses the iterate, with a residual of two-norm `size`."""
    is_accepted = search.accepts(size, state.start, state.length, at.num_steps)
    # At the level of rounding there is no descent to be seen.
    floor = (
        _ROUNDING_UNITS * rounding(at.y) * two_norm(at.y, axis_name).astype(size.dtype)
    )
    return at.is_trial & ~is_accepted & ~(size <= floor)


def follow(
    search: AbstractLineSearch,
    at: Evaluation[Y],
    size: Scalar,
    state: Descent,
    is_refused: BoolScalar,
    direction: Y,
    axis_name: AxisName,
) -> tuple[Y, Descent, BoolScalar]:
    """Go along `direction` from here, or less far along the last one.

    **Returns:**

    The next iterate, the next state, and whether the iterate is a trial.
    """
    one = jnp.ones((), state.length.dtype)
    # A singular Jacobian has no direction to offer: the plain step has.
    is_usable = tree_allfinite(direction, axis_name)
    direction = tree_where(is_usable, direction, difference(at.y, at.f))
    length = jnp.where(is_refused, search.shorten(state.length), one)
    moved = jnp.where(is_refused, length - state.length, length)
    direction = tree_where(is_refused, state.direction, direction)

    def move(y, d):
        step = d * moved.astype(real(d.dtype)).astype(d.dtype)
        return (y.astype(d.dtype) + step).astype(y.dtype)

    new = Descent(
        direction=direction,
        length=length,
        start=jnp.where(is_refused, state.start, size),
        num_shortened=state.num_shortened + (is_refused & at.proceed).astype(jnp.int32),
    )
    new = tree_where(at.is_live, new, state)
    return jtu.tree_map(move, at.y, direction), new, search.is_trial(length)


@jax.custom_jvp
def _once(x: Array) -> Array:
    return x


@_once.defjvp
def _once_jvp(primals, tangents):
    raise ValueError(
        "A step of Newton's method cannot be differentiated, as "
        "`adjoint=RecursiveCheckpointAdjoint()` does: take `equilax.ImplicitAdjoint`, "
        "or another solver."
    )


class System(eqx.Module):
    """`(I - J) d = g` at an iterate, in one real vector.

    **Attributes:**

    - `mv`: Multiplies by `I - J`.
    - `rhs`: The residual `g`.
    - `unravel`: Turns a solution into a tree like `y`.
    """

    mv: Callable[[Array], Array] = eqx.field(static=True)
    rhs: Float[Array, " n"]
    unravel: Callable[[Array], PyTree[Array]] = eqx.field(static=True)


def linearise(fn: Callable[[Y, Any], Y], at: Evaluation[Y], args: Any) -> System:
    """Newton's system, of which neither side can be differentiated."""
    dynamic, static = eqx.partition((fn, args), eqx.is_array)
    y, dynamic, f = jtu.tree_map(_once, (at.y, dynamic, at.f))
    fn, args = eqx.combine(dynamic, static)
    ravel, unravel = raveller(struct(y))
    _, product = jax.linearize(lambda y: fn(y, args), y)

    def mv(t):
        # A tangent varies over the mesh axes over which `y` does.
        tangent = jtu.tree_map(
            lambda x, like: vary_over(x, varying(like)), unravel(t), y
        )
        return t - ravel(product(tangent)).astype(t.dtype)

    return System(mv, ravel(difference(y, f)), unravel)
