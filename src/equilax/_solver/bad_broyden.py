import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._check import check_integer
from .._custom_types import AxisName, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, residual_dtype
from .._misc import difference, tree_allfinite, tree_where
from .._norm import max_norm
from . import ring
from .base import Step
from .inverse_estimate import AbstractInverseEstimate


# A change of the residual this small against it, in roundings, holds no information.
_ROUNDING_UNITS = 10


class _BadBroydenState(eqx.Module):
    # Rings of the changes of the residual and of what each adds to the inverse along
    # itself. Each row is divided by its largest element, so that squares stay in range
    # whatever the scale; `gains` is what a product of two such rows is multiplied by,
    # zero for a row without information.
    changes: PyTree[Array]
    additions: PyTree[Array]
    gains: Float[Array, " m"]
    num_used: IntScalar
    next_slot: IntScalar
    num_restarts: IntScalar
    last_residual: PyTree[Array]


class BadBroyden(AbstractInverseEstimate[Y, _BadBroydenState]):
    r"""Broyden's second method (the bad one), with limited memory.

    With $g(y) = f(y) - y$, $H_k$ approximates the inverse of the Jacobian of $g$:

    $y_{k+1} = y_k - H_k g_k, \qquad
    H_{k+1} = H_k + \frac{(s_k - H_k \Delta g_k)\, \Delta g_k^T}
    {\Delta g_k^T \Delta g_k}$

    for the step $s_k$, from $H_0 = -I$ (Broyden 1965, his second method). Of
    all the matrices that map the change of the residual to the step it is the nearest
    to the last. As $s_k = -H_k g_k$, the numerator is $-H_k g_{k+1}$, a product that
    the next step needs anyway. After `history_length` updates, or where the residual
    has not changed, the history starts anew, with a step of the plain iteration.

    Use it with a `history_length` of 20 or more, if there is memory for it, where
    [`equilax.Anderson`][] takes many steps. Against [`equilax.Broyden`][], the good
    one, it has a denominator that cannot vanish while the residual changes, a sum in
    place of a product for an inverse, and twice the memory at the same
    `history_length`.

    Adds `num_restarts` to `stats`. Cost: one evaluation of `fn` a step, and one more
    that tests the last; besides, `2 * history_length` passes through a `y`. Memory:
    `2 * history_length + 1` times `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=10)
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_integer("history_length", self.history_length, 1)

    def init(self, y, *, max_steps, state=None):
        del max_steps
        m, dtype = self.history_length, residual_dtype(y)
        zero = jnp.zeros((), jnp.int32)
        if state is None:
            rows = ring.empty(y, m)
            history = (rows, rows, jnp.zeros((m,), dtype), zero)
        else:
            old = (state.changes, state.additions, state.gains)
            history = (*ring.oldest_first(old, state.next_slot), state.num_used)
        return _BadBroydenState(
            *history,
            next_slot=zero,
            num_restarts=zero,
            last_residual=jtu.tree_map(
                lambda x: jnp.zeros(x.shape, at_least_single(x.dtype)), y
            ),
        )

    def step(self, fn, at, args, state):
        del fn, args
        m, dtype = self.history_length, state.gains.dtype
        residual = difference(at.y, at.f)
        applied = _apply(
            state, state.changes, state.additions, residual, self.axis_name
        )
        change = jtu.tree_map(jnp.subtract, residual, state.last_residual)
        row, size, is_normal = ring.normalised(change, dtype, self.axis_name)
        column, length, _ = ring.normalised(applied, dtype, self.axis_name)
        square = ring.inner(row, row, dtype, self.axis_name)
        floor = _ROUNDING_UNITS * float(jnp.finfo(dtype).eps)
        least = floor * max_norm(residual, self.axis_name).astype(dtype)
        has_changed = is_normal & (size > least)
        denominator = jnp.where(has_changed, size * square, 1)
        gain = length / denominator
        along = ring.inner(row, residual, dtype, self.axis_name) / denominator

        has_step = at.num_steps > 0
        is_secant = has_step & has_changed & (state.num_used < m)
        is_secant = is_secant & jnp.isfinite(gain)
        factor = jnp.where(is_secant, 1 - along, 1)
        direction = ring.scaled(applied, factor)
        is_lost = ~tree_allfinite(direction, self.axis_name)
        is_restart = (has_step & ~is_secant) | is_lost
        direction = tree_where(is_restart, residual, direction)
        add = lambda y, d: (y.astype(d.dtype) + d).astype(y.dtype)
        new_y = jtu.tree_map(add, at.y, direction)

        # An inverse that a later solve may go on with is not dropped at the very end.
        is_new = at.is_live & at.is_finite & (at.proceed | ~is_restart)
        slot = (at.num_steps - 1) % m
        is_written = is_new & is_secant & ~is_restart
        is_slot = is_written & (jnp.arange(m, dtype=slot.dtype) == slot)
        num_used = jnp.where(
            is_restart, 0, state.num_used + is_secant.astype(jnp.int32)
        )
        new = _BadBroydenState(
            changes=ring.write(state.changes, slot, row, is_written),
            additions=ring.write(state.additions, slot, column, is_written),
            gains=jnp.where(is_slot, gain, state.gains),
            num_used=jnp.where(is_new, num_used, state.num_used),
            next_slot=jnp.where(is_new, at.num_steps % m, state.next_slot),
            num_restarts=state.num_restarts
            + (is_restart & at.proceed).astype(jnp.int32),
            last_residual=tree_where(is_new, residual, state.last_residual),
        )
        return Step(new_y, new)

    def inverse_product(self, state, vector, *, transpose=False):
        wide = lambda x: x.astype(at_least_single(x.dtype))
        rings = (state.changes, state.additions)
        left, right = rings[::-1] if transpose else rings
        product = _apply(state, left, right, jtu.tree_map(wide, vector), self.axis_name)
        return jtu.tree_map(jnp.negative, product)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"num_restarts": state.num_restarts}


def _apply(
    state: _BadBroydenState,
    left: PyTree[Array],
    right: PyTree[Array],
    vector: PyTree[Array],
    axis_name: AxisName,
) -> PyTree[Array]:
    """The negative of the inverse, or of its transpose, times `vector`."""
    m = state.gains.shape[0]
    is_used = ring.ages(m, state.next_slot - 1) < state.num_used
    weights = jnp.where(is_used, state.gains, 0)
    weights = weights * ring.products(left, vector, weights.dtype, axis_name)
    minus = lambda x, rows: x - ring.combine(weights, rows).astype(x.dtype)
    return jtu.tree_map(minus, vector, right)


BadBroyden.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of updates between two new starts, at least 1.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
