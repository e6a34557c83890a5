import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._check import check_fraction
from .._custom_types import AxisName, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, real, residual_dtype
from .._misc import tree_where
from .._norm import max_norm
from .base import AbstractFixedPointSolver, Step
from .tolerance import is_budget_of


class Way(eqx.Module):
    """How an iterate was reached.

    **Attributes:**

    - `previous`: The iterate before it, in the dtype of `y`: rounded as the iterates
        are, or the way back would not meet them.
    - `num_steps`: The steps that led to it from the start of this solve.
    - `size`: The solver's norm of the largest iterate so far.
    """

    previous: PyTree[Array]
    num_steps: IntScalar
    size: Scalar


class _ReversibleState(eqx.Module):
    # Of the iterate; once the solve has ended, of the one that is returned.
    way: Way
    # Of the best iterate, which a solve that failed returns.
    best: Way

    @property
    def previous(self) -> PyTree[Array]:
        return self.way.previous


class Reversible(AbstractFixedPointSolver[Y, _ReversibleState]):
    r"""An iteration that can be run backwards.

    $y_{k+1} = (1 - \beta) y_{k-1} + \beta f(y_k), \qquad y_{-1} = y_0$

    (McCallum, Arora and Foster 2025, arXiv 2509.12917). Their scheme for a pair,
    $p' = (1 - \beta) p + \beta f(q)$ and $q' = (1 - \beta) q + \beta f(p')$, is two of
    these steps, and one evaluation of `fn` each.

    With eigenvalues $\lambda$ of the Jacobian, errors follow the roots of
    $t^2 - \beta \lambda t - (1 - \beta) = 0$. Both are inside the unit circle if and
    only if (by the test of Schur and Cohn)

    $(\mathrm{Re}\, \lambda)^2 +
    \left(\frac{\beta\, \mathrm{Im}\, \lambda}{2 - \beta}\right)^2 < 1,$

    an ellipse that holds the unit disc. Errors fall by no more than
    $\sqrt{1 - \beta}$ a step, whatever $f$.

    Use it where the steps have to be recomputed backwards, in a memory that does not
    grow with their number: see `reverse`. Where they do not, take
    [`equilax.Anderson`][]. A real eigenvalue outside of (-1, 1) makes it diverge,
    where [`equilax.FixedPointIteration`][] with a `damp` bears those below -1.

    Cost: one evaluation of `fn` a step, and one more that tests the last. Memory: three
    times `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    beta: RealScalarLike = 0.8
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_fraction("beta", self.beta)
        if isinstance(self.beta, (int, float)) and self.beta == 0:
            raise ValueError(f"`beta` must be in (0, 1); got {self.beta}.")

    def init(self, y, *, max_steps, state=None):
        del max_steps
        previous = y if state is None else state.way.previous
        size = jnp.zeros((), residual_dtype(y))
        way = Way(previous, jnp.zeros((), jnp.int32), size)
        return _ReversibleState(way, way)

    def step(self, fn, at, args, state):
        del fn, args

        def mix(old, f):
            dtype = at_least_single(f.dtype)
            weight = jnp.asarray(self.beta, real(dtype)).astype(dtype)
            new = (1 - weight) * old.astype(dtype) + weight * f.astype(dtype)
            return new.astype(f.dtype)

        new_y = jtu.tree_map(mix, state.way.previous, at.f)
        size = jnp.maximum(state.way.size, at.size)
        here = Way(state.way.previous, at.num_steps, size)
        # Of equals the last, as the loop has it.
        is_best = at.residual <= at.best_residual
        best = tree_where(is_best, here, state.best)
        # Which iterate is returned. From there a later solve goes on as if this one had
        # not stopped, and from there the steps are undone.
        is_budget = is_budget_of(self.rtol, self.atol)
        is_last = (at.scaled < 1) | is_budget | ~at.is_finite
        ended = tree_where(is_last, here, best)
        new = Way(at.y, at.num_steps + 1, size)
        moved = _ReversibleState(tree_where(at.proceed, new, ended), best)
        return Step(new_y, tree_where(at.is_live, moved, state))

    def reverse(self, f: Y, new_y: Y) -> Y:
        r"""Undo a step: from $f(y_k)$ and $y_{k+1}$ to $y_{k-1}$.

        $y_{k-1} = (y_{k+1} - \beta f(y_k)) / (1 - \beta)$

        **Arguments:**

        - `f`: `fn` at the iterate from which the step was taken.
        - `new_y`: The iterate to which it led.

        **Returns:**

        The iterate before both, up to rounding. Errors grow by up to $1 / (1 - \beta)$
        with each step undone. At $\beta = 0.8$ ten steps cost up to seven digits: all
        that float32 has, and less than half of what float64 has.
        """

        def unmix(f, new):
            dtype = at_least_single(f.dtype)
            weight = jnp.asarray(self.beta, real(dtype)).astype(dtype)
            old = (new.astype(dtype) - weight * f.astype(dtype)) / (1 - weight)
            return old.astype(f.dtype)

        return jtu.tree_map(unmix, f, new_y)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful, state
        return y, residual, {}


Reversible.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `beta`: The weight of the image, in (0, 1). The nearer to one, the more like the plain
    iteration, and the larger the errors of the way back.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
