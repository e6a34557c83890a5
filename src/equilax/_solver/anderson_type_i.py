import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._check import check_at_least, check_fraction, check_integer
from .._custom_types import AxisName, BoolScalar, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, real, residual_dtype
from .._misc import difference, tree_allfinite, tree_where
from .._norm import max_norm
from . import low_rank, ring
from .base import AbstractFixedPointSolver, Step
from .low_rank import Memory
from .rejections import Rejections


# A weight this much larger than the residual moves by rounding errors alone.
_LARGEST = 1e8
# The figures of the experiments of Zhang, O'Donoghue and Boyd: the residuals at which
# steps are accelerated have a finite sum, and so have these steps.
_SUM_BOUND = 1e6
_SUM_POWER = 1 + 1e-6


class _AndersonTypeIState(eqx.Module):
    memory: Memory
    next_slot: IntScalar
    # Of the last evaluation that was not taken back.
    last_y: PyTree[Array]
    last_residual: PyTree[Array]
    last_norm: Scalar
    first_norm: Scalar
    num_accelerated: IntScalar
    num_restarts: IntScalar
    rejections: Rejections


class AndersonTypeI(AbstractFixedPointSolver[Y, _AndersonTypeIState]):
    r"""Anderson acceleration of type I, stabilised.

    With $g_k = f(y_k) - y_k$, the step $s_k$ from $y_k$, and $\hat s_k$ the part of it
    that is orthogonal to the steps before it,

    $y_{k+1} = y_k + B_k^{-1} g_k, \qquad
    B_{k+1} = B_k - \theta_k \frac{(\Delta g_k + B_k s_k)\, \hat s_k^T}
    {\hat s_k^T \hat s_k}$

    from $B_0 = I$: an estimate of $I - J$, where [`equilax.Anderson`][] has one of its
    inverse (Zhang, O'Donoghue and Boyd 2020, algorithm AA-I-S-m; Fang and Saad 2009).
    $\theta_k$ is 1 unless $B_{k+1}$ would be too near to a singular matrix, by Powell's
    rule. The memory starts anew when it is full, or when a step holds too little that
    is new. A step of the plain iteration, with the `damp`, is taken at first, instead
    of one that raised the residual too much, and where

    $\|g_k\| > 10^6 \|g_0\| (n + 1)^{-(1 + 10^{-6})}$

    after $n$ accelerated steps. With a positive `damp` their proof of convergence asks
    no more of a map than not to expand in the Euclidean norm; it may have kinks.

    Use it for maps that contract slowly and have a Jacobian near to a symmetric one, or
    kinks: value iteration, and the gradient, proximal and splitting methods of convex
    optimisation. Far from symmetry, as for a rotation, [`equilax.Anderson`][] takes
    fewer steps; where it takes as many, its memory costs fewer passes.

    Adds `num_restarts` and `rejections` to `stats`. Cost: one evaluation of `fn` a
    step, and one more that tests the last; besides, `7 * history_length` passes through
    a `y`. Memory: `2 * history_length + 2` times `y`. The weights are common to all
    leaves of `y`, and real for complex ones.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=5)
    damp: RealScalarLike = 0.0
    regularisation: RealScalarLike = 0.01
    independence: RealScalarLike = 1e-3
    safeguard: RealScalarLike = 10.0
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_integer("history_length", self.history_length, 1)
        check_fraction("damp", self.damp)
        check_fraction("regularisation", self.regularisation)
        check_fraction("independence", self.independence)
        check_at_least("safeguard", self.safeguard, 1.0)

    def init(self, y, *, max_steps, state=None):
        del max_steps
        m, dtype = self.history_length, residual_dtype(y)
        zero, none = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
        if state is None:
            memory = low_rank.empty(y, m, dtype)
        else:
            memory = low_rank.resume(state.memory, state.next_slot)
        return _AndersonTypeIState(
            memory=memory,
            next_slot=zero,
            last_y=y,
            last_residual=jtu.tree_map(
                lambda x: jnp.zeros(x.shape, at_least_single(x.dtype)), y
            ),
            last_norm=none,
            first_norm=none,
            num_accelerated=zero,
            num_restarts=zero,
            rejections=Rejections.none(),
        )

    def step(self, fn, at, args, state):
        del fn, args
        dtype = state.last_norm.dtype
        residual = difference(at.y, at.f)
        limit = jnp.asarray(self.safeguard, at.residual.dtype) * state.last_norm
        # Also where the residual is not a number.
        is_rejected = at.is_trial & ~(at.residual <= limit)
        memory, is_new, is_restart = self._remember(at, residual, state)
        is_used = low_rank.used(memory, at.num_steps - 1)
        overlaps = ring.products(memory.steps, residual, dtype, self.axis_name)
        weights = low_rank.multiply(memory.inverse, jnp.where(is_used, overlaps, 0))
        is_degenerate = ~(jnp.max(jnp.abs(weights)) <= _LARGEST * at.residual)
        is_degenerate = is_degenerate & ~is_rejected

        # The step starts from here, or from where the one that is taken back did.
        here = (at.y, residual, at.residual)
        before = (state.last_y, state.last_residual, state.last_norm)
        base = tree_where(at.is_live & ~is_rejected, here, before)
        first_norm = jnp.where(at.num_steps == 0, at.residual, state.first_norm)
        num = (state.num_accelerated + 1).astype(dtype)
        is_large = at.residual > _SUM_BOUND * first_norm * num**-_SUM_POWER
        is_plain = is_rejected | is_degenerate | is_large | ~jnp.any(is_used)

        def move(y, g, rows):
            damp = jnp.asarray(self.damp, real(g.dtype)).astype(g.dtype)
            far = g + ring.combine(weights, rows).astype(g.dtype)
            step = jnp.where(is_plain, (1 - damp) * g, far)
            return (y.astype(g.dtype) + step).astype(y.dtype)

        new_y = jtu.tree_map(move, *base[:2], memory.changes)
        count = lambda cause: (cause & at.proceed).astype(jnp.int32)
        num_used = jnp.where(is_degenerate & at.proceed, 0, memory.num_used)
        m = self.history_length
        new = _AndersonTypeIState(
            memory=dataclasses.replace(memory, num_used=num_used),
            next_slot=jnp.where(is_new, at.num_steps % m, state.next_slot),
            last_y=base[0],
            last_residual=base[1],
            last_norm=base[2],
            first_norm=jnp.where(at.is_live, first_norm, state.first_norm),
            num_accelerated=state.num_accelerated + count(~is_plain),
            num_restarts=state.num_restarts + count(is_restart | is_degenerate),
            rejections=state.rejections.after(at, is_rejected, is_degenerate),
        )
        return Step(new_y, new, is_trial=~is_plain)

    def _remember(self, at, residual, state) -> tuple[Memory, BoolScalar, BoolScalar]:
        """The memory with the step that led here, if that is in it, if it begins so."""
        m, old, dtype = self.history_length, state.memory, state.last_norm.dtype
        is_new = at.is_live & (at.num_steps > 0)
        is_used = low_rank.used(old, at.num_steps - 2)
        step = difference(state.last_y, at.y)
        step, size, is_good = ring.normalised(step, dtype, self.axis_name)
        change = jtu.tree_map(jnp.subtract, state.last_residual, residual)
        change = ring.scaled(change, 1 / jnp.where(is_good, size, 1))
        # A plain step goes along a residual, which the steps before it span: nothing is
        # new but rounding, or what a kink adds.
        is_good = is_good & at.is_finite & (at.is_trial | ~jnp.any(is_used))

        overlaps = ring.products(old.steps, step, dtype, self.axis_name)
        overlaps = jnp.where(is_used, overlaps, 0)
        shares = overlaps / jnp.where(is_used, old.squares, 1)
        whole = ring.inner(step, step, dtype, self.axis_name)
        # By Pythagoras. What cancellation leaves of it is little as well.
        new_part = whole - jnp.sum(shares * overlaps)
        least = jnp.asarray(self.independence, dtype) ** 2 * whole
        is_restart = (old.num_used >= m) | (is_good & (new_part <= least))
        # A memory that a later solve may go on with is not begun anew at the very end.
        is_new = is_new & (at.proceed | ~is_restart)
        is_used = is_used & ~is_restart
        shares = jnp.where(is_used, shares, 0)
        minus = lambda x, rows: x - ring.combine(shares, rows).astype(x.dtype)
        row = jtu.tree_map(minus, step, old.steps)
        expected = jtu.tree_map(minus, step, old.changes)  # B s.
        row, unit, is_normal = ring.normalised(row, dtype, self.axis_name)
        surprise = jtu.tree_map(jnp.subtract, change, expected)
        surprise = ring.scaled(surprise, 1 / jnp.where(is_normal, unit, 1))

        slot = (at.num_steps - 1) % m
        is_slot = jnp.arange(m, dtype=slot.dtype) == slot
        kept = jnp.where(is_used[:, None] & is_used[None, :], old.inverse, 0)
        kept = dataclasses.replace(old, inverse=kept)
        least = jnp.asarray(self.regularisation, dtype)
        theta, square, inverse = low_rank.append(
            kept, is_used, is_slot, row, surprise, least, self.axis_name
        )
        lost = ring.scaled(surprise, -theta)
        lost = jtu.tree_map(lambda x, like: x.astype(like.dtype), lost, old.changes)
        is_good = is_good & is_normal & tree_allfinite((lost, inverse), self.axis_name)
        clear = lambda tree: jtu.tree_map(lambda x: jnp.where(is_good, x, 0), tree)
        new = (
            jnp.where(is_slot, clear(square), old.squares),
            jnp.where(is_good, inverse, kept.inverse),
            jnp.where(is_restart, 1, old.num_used + 1),
        )
        new = tree_where(is_new, new, (old.squares, old.inverse, old.num_used))
        steps = ring.write(old.steps, slot, clear(row), is_new)
        changes = ring.write(old.changes, slot, clear(lost), is_new)
        return Memory(steps, changes, *new), is_new, is_restart & is_new

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        stats = {"num_restarts": state.num_restarts, "rejections": state.rejections}
        return y, residual, stats


AndersonTypeI.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of steps that are kept, at least 1.
- `damp`: The damping of the plain steps, in [0, 1).
- `regularisation`: The least factor by which a step changes the determinant of the
    estimate of `I - J`, in [0, 1).
- `independence`: The least part of a step that must be orthogonal to those before it,
    in [0, 1); the memory starts anew where it is not.
- `safeguard`: The factor by which an accelerated step may raise the residual, at least
    one; infinity takes no step back.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
