import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from .._check import check_integer, check_tolerances
from .._custom_types import IntScalar, Norm, RealScalarLike, Y
from .._dtype import residual_dtype
from .._misc import difference, tree_where
from .._norm import max_norm
from . import ring
from .base import AbstractFixedPointSolver


# An update whose denominator is this small against its terms holds no information.
_DEGENERATE = 1e-6


def _scaled(tree: PyTree[Array], factor: Scalar) -> PyTree[Array]:
    return jtu.tree_map(lambda x: x * factor.astype(x.real.dtype).astype(x.dtype), tree)


class _BroydenState(eqx.Module):
    # The steps since the history began, each divided by its largest element, and their
    # inner products: H is a product of matrices made of successive steps alone.
    steps: PyTree[Array]
    units: Float[Array, " m"]
    gram: Float[Array, "m m"]
    num_used: IntScalar
    num_restarts: IntScalar


class Broyden(AbstractFixedPointSolver[Y, _BroydenState]):
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

    Adds `num_restarts` to `stats`. Cost: one evaluation of `fn` a step, and one more
    that tests the last; besides, `2 * history_length` passes through a `y`. Memory:
    `history_length` times `y`.
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
        m, dtype = self.history_length, residual_dtype(y)
        return _BroydenState(
            steps=ring.empty(y, m),
            units=jnp.ones((m,), dtype),
            gram=jnp.zeros((m, m), dtype),
            num_used=jnp.zeros((), jnp.int32),
            num_restarts=jnp.zeros((), jnp.int32),
        )

    def step(self, fn, at, args, state):
        del fn, args
        residual = difference(at.y, at.f)
        weights, last, overlaps = self._substitute(at, residual, state)
        denominator = 1 - last
        is_first = state.num_used == 0
        is_full = state.num_used > self.history_length
        is_good = jnp.abs(denominator) > _DEGENERATE * (1 + jnp.abs(last))
        is_good = is_good & ~is_full & ~is_first
        scale = 1 / jnp.where(is_good, denominator, 1)
        moved = jtu.tree_map(
            lambda g, rows: g + ring.combine(weights, rows).astype(g.dtype),
            residual,
            state.steps,
        )
        step = tree_where(is_good, _scaled(moved, scale), residual)
        state = self._remember(at, step, overlaps * scale, is_good, is_first, state)
        new_y = jtu.tree_map(
            lambda y, s: (y.astype(s.dtype) + s).astype(y.dtype), at.y, step
        )
        is_finite = jnp.isfinite(max_norm(step))
        return tree_where(is_finite, new_y, at.f), state, 0

    def _substitute(self, at, residual, state: _BroydenState):
        """Apply the factors of H to `residual`, in terms of inner products alone.

        With $z_0 = g$ and $z_{i+1} = z_i + c_i s_{i+1}$, $c_i = s_i^T z_i / s_i^T s_i$
        for the steps $s_i$ from the oldest to the one before the last (Kelley 1995,
        algorithm brsol).

        **Returns:**

        The weight of each row in $z$, $c_i$ of the last step, and the inner products
        of all rows with $z$.
        """
        m, dtype = self.history_length, state.gram.dtype
        # By age, the oldest first: the next slot to be written is that of the oldest.
        shift = at.num_steps % m
        by_age = lambda x: jnp.roll(x, -shift, axis=0)
        overlaps = by_age(ring.products(state.steps, residual, dtype))
        units, gram = by_age(state.units), by_age(by_age(state.gram).T).T
        num_used = jnp.minimum(state.num_used, m)
        weights, last = [jnp.zeros((), dtype)], jnp.zeros((), dtype)
        for i in range(m):
            length = gram[i, i] * units[i]
            is_used = (i >= m - num_used) & (length > 0)
            last = jnp.where(is_used, overlaps[i] / jnp.where(is_used, length, 1), 0)
            if i + 1 < m:
                weight = last * units[i + 1]
                weights.append(weight)
                overlaps = overlaps + weight * gram[:, i + 1]
        by_slot = lambda x: jnp.roll(x, shift, axis=0)
        return by_slot(jnp.stack(weights)), last, by_slot(overlaps)

    def _remember(self, at, step, overlaps, is_good, is_first, state: _BroydenState):
        dtype, m = state.gram.dtype, self.history_length
        slot = at.num_steps % m
        size = max_norm(step).astype(dtype)
        unit = jnp.where((size >= jnp.finfo(dtype).tiny) & jnp.isfinite(size), size, 1)
        row = _scaled(step, 1 / unit)
        is_slot = jnp.arange(m, dtype=slot.dtype) == slot
        length = ring.products(jtu.tree_map(lambda x: x[None], row), row, dtype)[0]
        column = jnp.where(is_slot, length, overlaps / unit)
        gram = jnp.where(is_slot[None, :], column[:, None], state.gram)
        gram = jnp.where(is_slot[:, None], column[None, :], gram)
        is_restart = ~is_good & ~is_first
        new = (
            jnp.where(is_slot, unit, state.units),
            gram,
            jnp.where(is_good, state.num_used, 0) + 1,
            state.num_restarts + (is_restart & at.proceed).astype(jnp.int32),
        )
        old = (state.units, state.gram, state.num_used, state.num_restarts)
        steps = ring.write(state.steps, slot, row, at.is_live)
        return _BroydenState(steps, *tree_where(at.is_live, new, old))

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"num_restarts": state.num_restarts}


Broyden.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of updates between two new starts, at least 1.
"""
