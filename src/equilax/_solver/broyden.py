import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree, Scalar

from .._check import check_integer, check_tolerances
from .._custom_types import IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, residual_dtype
from .._misc import tree_where
from .._norm import max_norm
from . import ring
from .base import AbstractFixedPointSolver


# An update whose denominator is this small against its terms holds no information.
_DEGENERATE = 1e-6


class _BroydenState(eqx.Module):
    # H = -I + sum_j left_j right_j^T approximates the inverse of the Jacobian of
    # g(y) = f(y) - y. Rows are in units of the step that they were made from.
    left: PyTree[Array]
    right: PyTree[Array]
    is_used: Bool[Array, " m"]
    last_step: PyTree[Array]
    num_restarts: IntScalar


def _scaled(tree: PyTree[Array], factor: Scalar) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x * factor.astype(x.real.dtype).astype(x.dtype), tree)


def _add(a: PyTree[Array], b: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(jnp.add, a, b)


def _dot(a: PyTree[Array], b: PyTree[Array], dtype) -> Scalar:
    one = jtu.tree_map(lambda x: x[None], a)
    return ring.products(one, b, dtype)[0]


class Broyden(AbstractFixedPointSolver[Y, _BroydenState]):
    r"""Broyden's method (the good one), with limited memory.

    With $g(y) = f(y) - y$, $H_k$ approximates the inverse of the Jacobian of $g$:

    $y_{k+1} = y_k - H_k g_k, \qquad
    H_{k+1} = H_k + \frac{(s_k - H_k \Delta g_k)\, s_k^T H_k}{s_k^T H_k \Delta g_k}$

    for the step $s_k$, from $H_0 = -I$ (Broyden 1965, equation 4.11, by the formula of
    Sherman and Morrison). Updates are kept as pairs of vectors over the whole state.
    After `history_length` of them, or where one is degenerate, the history starts anew,
    with a step of the plain iteration: to drop the oldest alone does not converge.

    Use it with a `history_length` of 20 or more, if there is memory for it, where
    [`equilax.Anderson`][] takes many steps. On a linear map of `n` unknowns it ends in
    up to `2 * n` steps (Gay 1979) if they fit into the history, Anderson in `n + 1`.

    Adds `num_restarts` to `stats`. Cost: one evaluation of `fn` a step, and one more
    that tests the last; besides, `4 * history_length` passes through a `y`. Memory:
    `2 * history_length + 1` times `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_integer("history_length", self.history_length, 1)

    def init(self, y, *, max_steps):
        del max_steps
        history = ring.empty(y, self.history_length)
        return _BroydenState(
            left=history,
            right=history,
            is_used=jnp.zeros((self.history_length,), bool),
            last_step=jtu.tree_map(
                lambda x: jnp.zeros(x.shape, at_least_single(x.dtype)), y
            ),
            num_restarts=jnp.zeros((), jnp.int32),
        )

    def step(self, fn, at, args, state):
        del fn, args
        residual = jtu.tree_map(
            lambda s, f, y: f.astype(s.dtype) - y.astype(s.dtype),
            state.last_step,
            at.f,
            at.y,
        )
        dtype = residual_dtype(at.y)
        size = max_norm(state.last_step)
        unit = jnp.where(size >= jnp.finfo(dtype).tiny, size, 1).astype(dtype)
        last = _scaled(state.last_step, 1 / unit)
        # H_k g_{k+1}, H_k^T s_k and the denominator, in units of the step.
        weights = self._masked(state, state.right, residual, dtype)
        moved = self._apply(residual, weights, state.left, 1 / unit)
        back = self._masked(state, state.left, last, dtype)
        right = self._apply(last, back, state.right, jnp.ones((), dtype))
        length, overlap = _dot(last, last, dtype), _dot(last, moved, dtype)
        denominator = overlap + length
        floor = _DEGENERATE * (jnp.abs(overlap) + length)
        is_first = at.num_steps == 0
        is_full = jnp.all(state.is_used)
        is_good = (jnp.abs(denominator) > floor) & ~is_full & ~is_first
        left = _scaled(moved, -1 / jnp.where(is_good, denominator, 1))
        gained = _dot(right, residual, dtype) / unit
        step = _scaled(_add(moved, _scaled(left, gained)), -unit)
        step = tree_where(is_good, step, residual)
        return self._finish(at, state, step, left, right, is_good, is_first)

    def _masked(self, state, rows, vector, dtype) -> Array:
        weights = ring.products(rows, vector, dtype)
        return jnp.where(state.is_used, weights, 0)

    def _apply(self, vector, weights, rows, factor) -> PyTree[Array]:
        """`factor * (-vector + sum_j weights_j rows_j)`: H or its transpose."""
        total = jtu.tree_map(
            lambda x, r: ring.combine(weights, r).astype(x.dtype) - x, vector, rows
        )
        return _scaled(total, factor)

    def _finish(self, at, state, step, left, right, is_good, is_first):
        is_live = at.is_live
        # The same for all samples of a batch, wherever their histories began.
        slot = at.num_steps % self.history_length
        is_slot = jnp.arange(self.history_length, dtype=slot.dtype) == slot
        is_used = (state.is_used | is_slot) & is_good
        restarted = ~is_good & ~is_first & at.proceed
        rest = (is_used, step, state.num_restarts + restarted.astype(jnp.int32))
        kept = (state.is_used, state.last_step, state.num_restarts)
        state = _BroydenState(
            ring.write(state.left, slot, left, is_live & is_good),
            ring.write(state.right, slot, right, is_live & is_good),
            *tree_where(is_live, rest, kept),
        )
        new_y = jtu.tree_map(
            lambda y, s: (y.astype(s.dtype) + s).astype(y.dtype), at.y, step
        )
        is_finite = jnp.isfinite(max_norm(step))
        return tree_where(is_finite, new_y, at.f), state, 0

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"num_restarts": state.num_restarts}


Broyden.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of updates between two new starts, at least 1.
"""
