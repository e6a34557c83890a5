import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._check import check_instance, check_integer
from .._custom_types import AxisName, BoolScalar, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, real, residual_dtype
from .._misc import difference, tree_where
from .._norm import max_norm
from . import factors, ring
from .base import Step
from .factors import Factors
from .inverse_estimate import AbstractInverseEstimate
from .line_search import AbstractLineSearch, FullStep


# An update whose denominator is this small against its terms holds no information.
_DEGENERATE = 1e-6


class _BroydenState(eqx.Module):
    factors: Factors
    next_slot: IntScalar
    num_restarts: IntScalar
    # Of the step that led here, and of the residual where it began.
    length: Scalar
    start: Scalar


class _Proposal(eqx.Module):
    # The direction, and the inner products of the rows with it.
    direction: PyTree[Array]
    overlaps: Float[Array, " m"]
    # How far it is followed in all, and how far from here.
    length: Scalar
    moved: Scalar
    start: Scalar
    has_next: Bool[Array, " m"]
    num_used: IntScalar
    is_restart: BoolScalar


class Broyden(AbstractInverseEstimate[Y, _BroydenState]):
    r"""Broyden's method (the good one), with limited memory.

    With $g(y) = f(y) - y$, $H_k$ approximates the inverse of the Jacobian of $g$:

    $y_{k+1} = y_k - H_k g_k, \qquad
    H_{k+1} = H_k + \frac{(s_k - H_k \Delta g_k)\, s_k^T H_k}{s_k^T H_k \Delta g_k}$

    for the step $s_k$, from $H_0 = -I$ (Broyden 1965, equation 4.11, by the formula of
    Sherman and Morrison). All updates follow from the steps, over the whole state.
    After `history_length` of them, or where one is degenerate, the history starts anew,
    with a step of the plain iteration: to drop the oldest alone does not converge.

    Use it with a `history_length` of 20 or more, if there is memory for it, where
    [`equilax.Anderson`][] takes many steps. On a linear map of `n` unknowns it ends in
    up to `2 * n` steps (Gay 1979) if they fit into the history, Anderson in `n + 1`.

    A `line_search` keeps it from flying off; a step of length $\lambda$ then goes into
    the same formula. A trial takes a place in the history.

    Adds `num_restarts` to `stats`. Cost: one evaluation of `fn` a step, and one more
    that tests the last; besides, `2 * history_length` passes through a `y`. Memory:
    `history_length` times `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=10)
    line_search: AbstractLineSearch = FullStep()
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_integer("history_length", self.history_length, 1)
        check_instance("line_search", self.line_search, AbstractLineSearch)

    def init(self, y, *, max_steps, state=None):
        del max_steps
        m, dtype = self.history_length, residual_dtype(y)
        has_lengths = not isinstance(self.line_search, FullStep)
        if state is None:
            history = factors.empty(y, m, dtype, has_lengths)
        else:
            history = factors.resume(state.factors, state.next_slot)
        zero = jnp.zeros((), jnp.int32)
        inf = jnp.array(jnp.inf, dtype)
        return _BroydenState(history, zero, zero, jnp.ones((), dtype), inf)

    def step(self, fn, at, args, state):
        del fn, args
        proposed = self._propose(at, state)
        if not isinstance(self.line_search, FullStep):
            is_accepted = self.line_search.accepts(
                at.residual, state.start, state.length, at.num_steps
            )
            is_accepted = ~at.is_trial | is_accepted
            proposed = tree_where(is_accepted, proposed, self._shorten(at, state))
        direction, moved = proposed.direction, proposed.moved

        def add(y, d):
            step = d * moved.astype(real(d.dtype)).astype(d.dtype)
            return (y.astype(d.dtype) + step).astype(y.dtype)

        new_y = jtu.tree_map(add, at.y, direction)
        is_trial = self.line_search.is_trial(proposed.length)
        return Step(new_y, self._remember(at, proposed, state), is_trial=is_trial)

    def _propose(self, at, state: _BroydenState) -> _Proposal:
        """A direction from here."""
        m, old = self.history_length, state.factors
        residual = difference(at.y, at.f)
        applied = factors.apply(old, at.num_steps % m, residual, self.axis_name)
        weights, overlaps, last = applied.weights, applied.overlaps, applied.last
        is_newest = jnp.arange(m, dtype=jnp.int32) == (at.num_steps - 1) % m
        if old.lengths is not None:
            extra = jnp.sum(jnp.where(is_newest, old.units, 0))
            extra = extra * last * (state.length - 1)
            column = jnp.sum(jnp.where(is_newest[None], old.gram, 0), axis=1)
            weights = weights + jnp.where(is_newest, extra, 0)
            overlaps = overlaps + extra * column
        denominator = 1 - last
        is_good = jnp.abs(denominator) > _DEGENERATE * (1 + jnp.abs(last))
        has_step = at.num_steps > 0
        is_secant = has_step & is_good & (old.num_used <= m)
        scale = 1 / jnp.where(is_secant, denominator, 1)

        def turn(g, rows):
            new = g + ring.combine(weights, rows).astype(g.dtype)
            return new * scale.astype(real(g.dtype)).astype(g.dtype)

        direction = jtu.tree_map(turn, residual, old.rows)
        is_lost = ~jnp.isfinite(max_norm(direction, self.axis_name))
        is_restart = (has_step & ~is_secant) | is_lost
        one = jnp.ones((), scale.dtype)
        return _Proposal(
            direction=tree_where(is_restart, residual, direction),
            overlaps=jnp.where(is_restart, 0, overlaps * scale),
            length=one,
            moved=one,
            start=at.residual,
            has_next=jnp.where(is_newest, is_secant & ~is_restart, old.has_next),
            num_used=jnp.where(is_restart, 0, old.num_used),
            is_restart=is_restart,
        )

    def _shorten(self, at, state: _BroydenState) -> _Proposal:
        """The same direction from where it began, and less of it."""
        m, old = self.history_length, state.factors
        newest = (at.num_steps - 1) % m
        is_newest = jnp.arange(m, dtype=jnp.int32) == newest
        unit = jnp.sum(jnp.where(is_newest, old.units, 0))
        column = jnp.sum(jnp.where(is_newest[None], old.gram, 0), axis=1)
        wide = lambda x: x.astype(at_least_single(x.dtype))
        row = jtu.tree_map(wide, ring.read(old.rows, newest))
        length = self.line_search.shorten(state.length)
        # The copy that `_remember` writes stands for it: it has no factor of its own.
        return _Proposal(
            direction=ring.scaled(row, unit),
            overlaps=column * unit,
            length=length,
            moved=length - state.length,
            start=state.start,
            has_next=old.has_next & ~is_newest,
            num_used=old.num_used,
            is_restart=jnp.array(False),
        )

    def _remember(self, at, new: _Proposal, state: _BroydenState) -> _BroydenState:
        old, m = state.factors, self.history_length
        dtype = old.units.dtype
        slot = at.num_steps % m
        row, size, is_normal = ring.normalised(new.direction, dtype, self.axis_name)
        unit = jnp.where(is_normal, size, 1)
        is_slot = jnp.arange(m, dtype=slot.dtype) == slot
        square = ring.inner(row, row, dtype, self.axis_name)
        column = jnp.where(is_slot, square, new.overlaps / unit)
        gram = jnp.where(is_slot[None, :], column[:, None], old.gram)
        # After the last evaluation nothing begins anew, nor takes the place of the
        # oldest direction: the history serves the next solve.
        is_kept = at.is_live & (at.proceed | (~new.is_restart & (old.num_used < m)))
        rows = ring.write(old.rows, slot, row, is_kept)
        lengths = old.lengths
        if lengths is not None:
            lengths = jnp.where(is_slot & is_kept, new.length, lengths)
        changed = (
            jnp.where(is_slot, unit, old.units),
            jnp.where(is_slot[:, None], column[None, :], gram),
            new.has_next & ~is_slot,
            new.num_used + 1,
            (slot + 1) % m,
            state.num_restarts + (new.is_restart & at.proceed).astype(jnp.int32),
            new.length,
            new.start,
        )
        kept = (
            old.units,
            old.gram,
            old.has_next,
            old.num_used,
            state.next_slot,
            state.num_restarts,
            state.length,
            state.start,
        )
        units, gram, has_next, num_used, *rest = tree_where(is_kept, changed, kept)
        return _BroydenState(
            Factors(rows, units, gram, has_next, lengths, num_used), *rest
        )

    def inverse_product(self, state, vector, *, transpose=False):
        old = state.factors
        wide = lambda x: x.astype(at_least_single(x.dtype))
        vector = jtu.tree_map(wide, vector)
        applied = factors.apply(
            old, state.next_slot, vector, self.axis_name, transpose=transpose
        )
        return jtu.tree_map(
            lambda x, rows: -(x + ring.combine(applied.weights, rows).astype(x.dtype)),
            vector,
            old.rows,
        )

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"num_restarts": state.num_restarts}


Broyden.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of updates between two new starts, at least 1.
- `line_search`: How far to follow a direction, such as [`equilax.Backtracking`][].
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
