import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from .._check import (
    check_at_least,
    check_fraction,
    check_integer,
    check_nonnegative,
)
from .._custom_types import AxisName, BoolScalar, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, real, residual_dtype
from .._mesh import all_vary, any_varying
from .._misc import difference, tree_where
from .._norm import max_norm
from . import ring
from .base import AbstractFixedPointSolver, Evaluation, Step
from .least_squares import least_squares
from .rejections import Rejections


# A weight this large, of rows as long as the residual, moves by rounding errors alone.
_LARGEST = 1e8


class _AlternatingState(eqx.Module):
    # Rings of evaluations as they were: what a plain step needs no differences for is
    # not made into any. Those of an earlier solve are differences from its last.
    iterates: PyTree[Array]
    images: PyTree[Array]
    norms: Float[Array, " rows"]
    is_row: Bool[Array, " rows"]
    is_difference: Bool[Array, " rows"]
    next_slot: IntScalar
    rejections: Rejections


def _over(flags: Array, x: Array) -> Array:
    """A number for each row, to be broadcast over the rows of `x`."""
    return flags.reshape(-1, *(1,) * (x.ndim - 1))


class AlternatingAnderson(AbstractFixedPointSolver[Y, _AlternatingState]):
    r"""Anderson's extrapolation in every `period`-th step, and plain steps between.

    With $g_j = f(y_j) - y_j$, the plain step $p_j = f(y_j) - d\, g_j$ with $d$ the
    `damp`, and $j$ the last $m$ steps before $k$, it goes to

    $y_{k+1} = p_k - \sum_j \gamma_j (p_j - p_k),$
    $\gamma = \arg\min_\gamma \|g_k - \sum_j \gamma_j (g_j - g_k)\|_2$

    in the steps of which `k + 1` is a multiple of `period`, which is the step of
    [`equilax.Anderson`][], and to $p_k$ in all others (Banerjee, Suryanarayana and Pask
    2016, algorithm 2; Pratapa, Suryanarayana and Pask 2016, algorithm 1). Weights are
    computed, refused and regularised as there.

    Use it where `fn` contracts: it then takes as many steps as `Anderson` or fewer,
    three quarters of them where a symmetric Jacobian is close to one, as a plain step
    lets what contracts fast die away and leaves the history to the rest. And most of
    its steps are cheaper. The default adjoint of a solve by it is solved by it too.
    Where `fn` does not contract, plain steps lead away.

    Cost: one evaluation of `fn` a step, and one more that tests the last; besides, ten
    passes through a `y`, and in every `period`-th step `5 * history_length` more.
    Memory: `2 * history_length + 2` times `y`, and half as much again in a step that
    extrapolates. The weights are common to all leaves of `y`, and real for complex
    ones.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=5)
    period: int = eqx.field(static=True, default=3)
    damp: RealScalarLike = 0.0
    ridge: RealScalarLike = 1e-10
    safeguard: RealScalarLike = 2.0
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_fraction("damp", self.damp)
        check_integer("history_length", self.history_length, 1)
        check_integer("period", self.period, 1)
        check_nonnegative("ridge", self.ridge)
        check_at_least("safeguard", self.safeguard, 1.0)

    @property
    def _num_rows(self) -> int:
        return self.history_length + 1

    def _is_row_of(self, num_steps: IntScalar) -> Bool[Array, " rows"]:
        # A mask, where indexing would be a scatter, which no compiler fuses.
        rows = jnp.arange(self._num_rows, dtype=num_steps.dtype)
        return rows == num_steps % self._num_rows

    def init(self, y, *, max_steps, state=None):
        del max_steps
        n, zero = self._num_rows, jnp.zeros((), jnp.int32)
        empty, nothing = ring.empty(y, n), jnp.zeros(n, bool)
        norms = jnp.zeros(n, residual_dtype(y))
        history = (empty, empty, norms, nothing, nothing)
        if state is not None:
            history = self._differences(state)
        return _AlternatingState(*history, zero, Rejections.none())

    def _differences(self, state: _AlternatingState):
        """What an earlier solve knew, of use where `fn` is a little different now."""
        rows = (state.iterates, state.images, state.norms)
        flags = (state.is_row, state.is_difference)
        # The last comes first, and is written over first.
        both = ring.oldest_first((*rows, *flags), state.next_slot - 1)
        *rows, norms, is_row, is_difference = both
        less = lambda x: jnp.where(_over(is_difference, x), x, x - x[:1])
        iterates, images = jtu.tree_map(less, rows)
        # Without the last there is nothing that the others could be differences from.
        is_row = is_row & (is_row[:1] | is_difference)
        norms = jnp.maximum(norms, norms[:1])
        return iterates, images, norms, is_row, jnp.ones_like(is_row)

    def step(self, fn, at, args, state):
        del fn, args
        before = (at.num_steps - 1) % self._num_rows
        limit = jnp.asarray(self.safeguard, at.residual.dtype) * state.norms[before]
        # Also where the residual is not a number.
        is_rejected = at.is_trial & ~(at.residual <= limit)
        state = self._remember(at, state)
        moved, is_moved, is_degenerate = self._turn(at, state)
        is_moved = is_moved & ~is_rejected
        is_degenerate = is_degenerate & ~is_rejected & at.is_finite
        # A step that is taken back started from the row before. It is read from the
        # ring already written on: to keep that as it was would be a copy of it all.
        previous = ring.read((state.iterates, state.images), before)
        base = tree_where(is_rejected | ~at.is_finite, previous, (at.y, at.f))
        new_y = tree_where(is_moved, moved, jtu.tree_map(self._plain, *base))

        is_here = self._is_row_of(at.num_steps)
        state = dataclasses.replace(
            state,
            is_row=state.is_row & (is_here | ~(is_degenerate & at.is_live)),
            rejections=state.rejections.after(at, is_rejected, is_degenerate),
        )
        return Step(new_y, state, is_trial=is_moved)

    def _plain(self, y: Array, f: Array) -> Array:
        if isinstance(self.damp, (int, float)) and self.damp == 0:
            return f
        g = difference(y, f)
        damp = jnp.asarray(self.damp, real(g.dtype)).astype(g.dtype)
        return (f.astype(g.dtype) - damp * g).astype(f.dtype)

    def _remember(
        self, at: Evaluation[Y], state: _AlternatingState
    ) -> _AlternatingState:
        """The state with this evaluation written into it."""
        slot = at.num_steps % self._num_rows
        row = jtu.tree_map(lambda x: jnp.where(at.is_finite, x, 0), (at.y, at.f))
        iterates, images = ring.write(
            (state.iterates, state.images), slot, row, at.is_live
        )
        is_slot = at.is_live & self._is_row_of(at.num_steps)
        next_slot = (slot + 1) % self._num_rows
        return dataclasses.replace(
            state,
            iterates=iterates,
            images=images,
            norms=jnp.where(is_slot, at.residual, state.norms),
            is_row=jnp.where(is_slot, at.is_finite, state.is_row),
            is_difference=state.is_difference & ~is_slot,
            next_slot=jnp.where(at.is_live, next_slot, state.next_slot),
        )

    def _turn(
        self, at: Evaluation[Y], state: _AlternatingState
    ) -> tuple[Y, BoolScalar, BoolScalar]:
        """An extrapolation, if it is its turn."""
        if self.period == 1:
            return self._extrapolate(at, state)
        is_turn = at.num_steps % self.period == self.period - 1
        # Varying before the branches and not in them: where samples count steps of
        # their own, both run on operands that JAX has made to vary as the choice does.
        operands = (at, state, jnp.array(False))
        # The number of steps is that of all live samples, so that one branch runs.
        return lax.cond(
            is_turn,
            lambda at, state, no: self._extrapolate(at, state),
            lambda at, state, no: (at.f, no, no),
            *all_vary(operands, any_varying(at, state)),
        )

    def _extrapolate(
        self, at: Evaluation[Y], state: _AlternatingState
    ) -> tuple[Y, BoolScalar, BoolScalar]:
        """Where to go, whether to, and whether the history is beyond use."""
        is_here = self._is_row_of(at.num_steps)
        is_used = state.is_row & ~is_here
        # In units of their residuals, squares of rows are in range whatever the scale.
        unit = jnp.where(is_used, jnp.maximum(state.norms, at.residual), at.residual)
        is_normal = unit >= jnp.finfo(unit.dtype).tiny
        inverse = 1 / jnp.where(is_normal, unit, 1)
        factor = lambda x, dtype: x.astype(real(dtype)).astype(dtype)
        less = lambda rows, last: jnp.where(
            _over(state.is_difference, rows), rows, rows - last[None]
        )

        def row(y, f, ys, fs):
            g = difference(y, f)
            rows = less(fs.astype(g.dtype) - ys.astype(g.dtype), g)
            # In its own place, where there is no difference, the residual itself.
            rows = jnp.where(_over(is_here, rows), g[None], rows)
            return rows * factor(_over(inverse, rows), g.dtype)

        rows = jtu.tree_map(row, at.y, at.f, state.iterates, state.images)
        gram = ring.gram(rows, unit.dtype, self.axis_name)
        products = jnp.sum(jnp.where(is_here[None, :], gram, 0), axis=1)
        both = is_used[:, None] & is_used[None, :]
        gram, products = jnp.where(both, gram, 0), jnp.where(is_used, products, 0)
        weights = least_squares(gram, products, is_used, self.ridge)
        is_degenerate = ~(jnp.max(jnp.abs(weights)) <= _LARGEST)
        weights = weights * inverse * at.residual

        def move(y, f, ys, fs):
            wide = at_least_single(f.dtype)
            start = self._plain(y, f).astype(wide)
            steps = less(self._plain(ys, fs).astype(wide), start)
            moved = start
            for i in range(self._num_rows):  # One pass, where a product would be two.
                moved = moved - factor(weights[i], wide) * steps[i]
            return moved.astype(f.dtype)

        moved = jtu.tree_map(move, at.y, at.f, state.iterates, state.images)
        return moved, jnp.any(weights != 0) & ~is_degenerate, is_degenerate

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"rejections": state.rejections}


AlternatingAnderson.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of steps `m` before this one that are kept, at least 1.
- `period`: Every how many steps to extrapolate, at least 1.
- `damp`: The damping of all steps, in [0, 1). Zero moves fully to the images.
- `ridge`: The regularisation, relative to the scale of the residuals; dimensionless.
- `safeguard`: The factor by which an extrapolated step may raise the residual, at least
    one; infinity takes no step back.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
