import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from equilax_kernels import spd_solve
from jaxtyping import Array, Float, PyTree, Scalar

from .._check import check_fraction, check_integer, check_nonnegative, check_tolerances
from .._custom_types import Norm, RealScalarLike, Y
from .._dtype import at_least_single, real, residual_dtype
from .._misc import difference, tree_where
from .._norm import max_norm
from . import ring
from .base import AbstractFixedPointSolver
from .fixed_point_iteration import damped


class _AndersonState(eqx.Module):
    # Rings of `m` differences between successive steps, each row divided by the
    # residual of its step: squares then stay in range for a problem of any scale, half
    # precision included.
    d_residuals: PyTree[Array]
    d_images: PyTree[Array]
    gram: Float[Array, "m m"]
    last_residual: PyTree[Array]
    last_image: PyTree[Array]
    last_norm: Scalar


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

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_fraction("damp", self.damp)
        check_integer("history_length", self.history_length, 1)
        check_nonnegative("ridge", self.ridge)

    def init(self, y, *, max_steps):
        del max_steps
        m, dtype = self.history_length, residual_dtype(y)
        history = ring.empty(y, m)
        return _AndersonState(
            d_residuals=history,
            d_images=history,
            gram=jnp.zeros((m, m), dtype),
            last_residual=jtu.tree_map(
                lambda x: jnp.zeros(x.shape, at_least_single(x.dtype)), y
            ),
            last_image=jtu.tree_map(jnp.zeros_like, y),
            last_norm=jnp.zeros((), dtype),
        )

    def step(self, fn, at, args, state):
        del fn, args
        residual = difference(at.y, at.f)
        state = self._remember(at, residual, state)
        weights = self._weights(at, residual, state)

        def extrapolate(y, f, g, d_image, d_residual):
            new = f.astype(g.dtype) - ring.combine(weights, d_image)
            if not (isinstance(self.damp, (int, float)) and self.damp == 0):
                damp = jnp.asarray(self.damp, real(g.dtype)).astype(g.dtype)
                new = new - damp * (g - ring.combine(weights, d_residual))
            return new.astype(y.dtype)

        new_y = jtu.tree_map(
            extrapolate, at.y, at.f, residual, state.d_images, state.d_residuals
        )
        plain = damped(self.damp, at.y, at.f)
        new_y = tree_where(jnp.all(jnp.isfinite(weights)), new_y, plain)
        return new_y, state, 0

    def _remember(self, at, residual, state: _AndersonState) -> _AndersonState:
        # The first step has no predecessor: what it writes is not valid, and the slot
        # is the last to be written again.
        slot = (at.num_steps - 1) % self.history_length
        scale = jnp.maximum(at.residual, state.last_norm)
        is_normal = (scale >= jnp.finfo(scale.dtype).tiny) & jnp.isfinite(scale)
        inverse = jnp.where(is_normal, 1 / jnp.where(is_normal, scale, 1), 1)

        def change(new, old, rows):
            dtype = at_least_single(new.dtype)
            difference = new.astype(dtype) - old.astype(dtype)
            return (difference * inverse.astype(dtype)).astype(rows.dtype)

        d_residual = jtu.tree_map(
            change, residual, state.last_residual, state.d_residuals
        )
        d_image = jtu.tree_map(change, at.f, state.last_image, state.d_images)
        d_residuals = ring.write(state.d_residuals, slot, d_residual, at.is_live)
        d_images = ring.write(state.d_images, slot, d_image, at.is_live)
        row = ring.products(d_residuals, d_residual, state.gram.dtype)
        # A mask, where indexing would be a scatter, which no compiler fuses.
        is_slot = jnp.arange(self.history_length, dtype=slot.dtype) == slot
        gram = jnp.where(is_slot[None, :], row[:, None], state.gram)
        gram = jnp.where(is_slot[:, None], row[None, :], gram)
        rest = (gram, residual, at.f, at.residual)
        old = (state.gram, state.last_residual, state.last_image, state.last_norm)
        return _AndersonState(d_residuals, d_images, *tree_where(at.is_live, rest, old))

    def _weights(self, at, residual, state: _AndersonState) -> Float[Array, " m"]:
        gram, m = state.gram, self.history_length
        products = ring.products(state.d_residuals, residual, gram.dtype)
        lengths = jnp.diagonal(gram)
        is_used = (jnp.arange(m, dtype=jnp.int32) < at.num_steps) & (lengths > 0)
        scale = jnp.where(is_used, 1 / jnp.sqrt(jnp.where(is_used, lengths, 1)), 0)
        cosines = gram * jnp.outer(scale, scale)
        # A row that is not used has a scale of zero, and one on the diagonal.
        diagonal = jnp.where(is_used, jnp.asarray(self.ridge, gram.dtype), 1)
        cosines = cosines + jnp.diag(diagonal)
        floor = jnp.array(10 * jnp.finfo(gram.dtype).eps, gram.dtype)
        return scale * spd_solve(cosines, scale * products, floor)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful, state
        return y, residual, {}


Anderson.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The number of differences `m` that are kept, at least 1.
- `damp`: The damping, in [0, 1). Zero moves fully to the images.
- `ridge`: The regularisation, relative to the scale of the residuals; dimensionless.
"""
