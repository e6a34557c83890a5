import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from .._check import (
    check_at_least,
    check_fraction,
    check_integer,
    check_nonnegative,
)
from .._custom_types import AxisName, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, real, residual_dtype
from .._misc import difference, tree_where
from .._norm import max_norm
from . import ring
from .base import AbstractFixedPointSolver, Step
from .least_squares import least_squares
from .rejections import Rejections


# A weight this much larger than the residual moves by rounding errors alone.
_LARGEST = 1e8


class _AndersonState(eqx.Module):
    # Rings of `m` differences between successive evaluations, each row divided by the
    # residual of its step: squares then stay in range for a problem of any scale, half
    # precision included.
    d_residuals: PyTree[Array]
    d_images: PyTree[Array]
    gram: Float[Array, "m m"]
    num_used: IntScalar
    next_slot: IntScalar
    # Of the last evaluation that was not taken back.
    last_residual: PyTree[Array]
    last_image: PyTree[Array]
    last_norm: Scalar
    rejections: Rejections


class Anderson(AbstractFixedPointSolver[Y, _AndersonState]):
    r"""Anderson acceleration (type II).

    With $g_k = f(y_k) - y_k$, and $\Delta g_j, \Delta f_j$ the differences of residuals
    and images between the last $m$ steps,

    $\gamma = \arg\min_\gamma \|g_k - \sum_j \gamma_j \Delta g_j\|_2,$
    $y_{k+1} = f(y_k) - d\, g_k - \sum_j \gamma_j (\Delta f_j - d\, \Delta g_j)$

    with $d$ the `damp` (Anderson 1965; Walker and Ni 2011, equation 2.2 and
    algorithm AA). The small system is that of the normal equations with unit diagonal,
    $(C + \mathrm{ridge}\, I) \hat\gamma = c$, so the ridge is relative to the scale of
    the residuals, whatever that is. Extrapolation starts with the second step. On a
    linear map of `n` unknowns, with `history_length` at least `n`, it ends in `n + 1`
    steps: it then equals GMRES.

    Use it by default. Where a step of `fn` costs no more than passing through its state
    a dozen times, and `fn` contracts fast, [`equilax.FixedPointIteration`][] takes less
    time for a few more steps.

    Cost: one evaluation of `fn` a step, and one more that tests the last; besides,
    `4 * history_length` passes through a `y`. Memory: `2 * history_length + 2` times
    `y`. The weights are common to all leaves of `y`, and real for complex ones.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=5)
    damp: RealScalarLike = 0.0
    ridge: RealScalarLike = 1e-10
    safeguard: RealScalarLike = 2.0
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_fraction("damp", self.damp)
        check_integer("history_length", self.history_length, 1)
        check_nonnegative("ridge", self.ridge)
        check_at_least("safeguard", self.safeguard, 1.0)

    def init(self, y, *, max_steps, state=None):
        del max_steps
        m, dtype = self.history_length, residual_dtype(y)
        zero, empty = jnp.zeros((), jnp.int32), ring.empty(y, m)
        history = (empty, empty, jnp.zeros((m, m), dtype), zero)
        if state is not None:
            old = (state.d_residuals, state.d_images)
            history = (
                *ring.oldest_first(old, state.next_slot),
                ring.oldest_first_both(state.gram, state.next_slot),
                state.num_used,
            )
        return _AndersonState(
            *history,
            next_slot=zero,
            last_residual=jtu.tree_map(
                lambda x: jnp.zeros(x.shape, at_least_single(x.dtype)), y
            ),
            last_image=jtu.tree_map(jnp.zeros_like, y),
            last_norm=jnp.zeros((), dtype),
            rejections=Rejections.none(),
        )

    def step(self, fn, at, args, state):
        del fn, args
        residual = difference(at.y, at.f)
        limit = jnp.asarray(self.safeguard, at.residual.dtype) * state.last_norm
        # Also where the residual is not a number.
        is_rejected = at.is_trial & ~(at.residual <= limit)
        new = self._remember(at, residual, state)
        weights = self._weights(at, residual, new)
        is_degenerate = ~(jnp.max(jnp.abs(weights)) <= _LARGEST * at.residual)
        is_degenerate = is_degenerate & ~is_rejected & at.is_finite

        # The step starts from here, or from where the one that is taken back did.
        here = (residual, at.f, at.residual)
        before = (state.last_residual, state.last_image, state.last_norm)
        is_base = at.is_live & ~is_rejected & at.is_finite
        base = tree_where(is_base, here, before)
        is_plain = is_rejected | is_degenerate

        def move(y, g, f, d_image, d_residual):
            moved = f.astype(g.dtype) - ring.combine(weights, d_image)
            plain = f.astype(g.dtype)
            if not (isinstance(self.damp, (int, float)) and self.damp == 0):
                damp = jnp.asarray(self.damp, real(g.dtype)).astype(g.dtype)
                plain = plain - damp * g
                moved = moved - damp * (g - ring.combine(weights, d_residual))
            return jnp.where(is_plain, plain, moved).astype(y.dtype)

        new_y = jtu.tree_map(move, at.y, *base[:2], new.d_images, new.d_residuals)
        is_new_start = is_degenerate & at.is_live
        new = dataclasses.replace(
            new,
            num_used=jnp.where(is_new_start, 0, new.num_used),
            last_residual=base[0],
            last_image=base[1],
            last_norm=base[2],
            rejections=state.rejections.after(at, is_rejected, is_degenerate),
        )
        return Step(new_y, new, is_trial=~is_plain & (new.num_used > 0))

    def _remember(self, at, residual, state: _AndersonState) -> _AndersonState:
        """The state with the difference from the last evaluation written into it."""
        m, dtype = self.history_length, state.gram.dtype
        is_new = at.is_live & (at.num_steps > 0)
        slot = (at.num_steps - 1) % m
        scale = jnp.maximum(at.residual, state.last_norm)
        is_normal = (scale >= jnp.finfo(dtype).tiny) & at.is_finite
        inverse = 1 / jnp.where(is_normal, scale, 1)

        def change(new, old, rows):
            dtype = at_least_single(new.dtype)
            moved = new.astype(dtype) - old.astype(dtype)
            # A row of zeros is not used.
            moved = jnp.where(at.is_finite, moved, 0)
            moved = moved * inverse.astype(real(dtype)).astype(dtype)
            return moved.astype(rows.dtype)

        d_residual = jtu.tree_map(
            change, residual, state.last_residual, state.d_residuals
        )
        d_image = jtu.tree_map(change, at.f, state.last_image, state.d_images)
        d_residuals = ring.write(state.d_residuals, slot, d_residual, is_new)
        row = ring.products(d_residuals, d_residual, dtype, self.axis_name)
        # A mask, where indexing would be a scatter, which no compiler fuses.
        is_slot = is_new & (jnp.arange(m, dtype=slot.dtype) == slot)
        gram = jnp.where(is_slot[None, :], row[:, None], state.gram)
        num_used = jnp.minimum(state.num_used + is_new.astype(jnp.int32), m)
        next_slot = at.num_steps % m
        return dataclasses.replace(
            state,
            d_residuals=d_residuals,
            d_images=ring.write(state.d_images, slot, d_image, is_new),
            gram=jnp.where(is_slot[:, None], row[None, :], gram),
            num_used=num_used,
            next_slot=jnp.where(at.is_live, next_slot, state.next_slot),
        )

    def _weights(self, at, residual, state: _AndersonState) -> Float[Array, " m"]:
        gram, m = state.gram, self.history_length
        products = ring.products(
            state.d_residuals, residual, gram.dtype, self.axis_name
        )
        is_used = ring.ages(m, (at.num_steps - 1) % m) < state.num_used
        return least_squares(gram, products, is_used, self.ridge)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"rejections": state.rejections}


Anderson.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of differences `m` that are kept, at least 1.
- `damp`: The damping, in [0, 1). Zero moves fully to the images.
- `ridge`: The regularisation, relative to the scale of the residuals; dimensionless.
- `safeguard`: The factor by which an extrapolated step may raise the residual, at least
    one; infinity takes no step back.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
