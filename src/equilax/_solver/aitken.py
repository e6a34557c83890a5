import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import AxisName, Norm, RealScalarLike, Y
from .._dtype import at_least_single
from .._misc import tree_allfinite, tree_where
from .._norm import max_norm
from .base import AbstractFixedPointSolver, Step


class Aitken(AbstractFixedPointSolver[Y, None]):
    r"""Aitken's extrapolation, element by element (Steffensen's method).

    With $y' = f(y_k)$ and $y'' = f(y')$,

    $y_{k+1} = y_k - \frac{(y' - y_k)^2}{y'' - 2 y' + y_k}$

    in each element (Aitken 1926; Steffensen 1933). Where the denominator vanishes, or
    the result is not finite, the element is $y''$.

    Use it for a number, or for elements that don't depend on each other: convergence is
    then quadratic. Where they do, take [`equilax.Anderson`][].

    Cost: two evaluations of `fn` a step, and one more that tests the last. Memory:
    twice `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def init(self, y, *, max_steps, state=None):
        del y, max_steps, state
        return None

    def step(self, fn, at, args, state):
        second = fn(at.f, args)
        second = tree_where(tree_allfinite(second, self.axis_name), second, at.f)

        def extrapolate(y, first, last):
            dtype = at_least_single(y.dtype)
            wide_y, wide_first, wide_last = (x.astype(dtype) for x in (y, first, last))
            r = wide_first - wide_y
            v = (wide_last - wide_first) - r
            new = wide_y - r * (r / jnp.where(v == 0, 1, v))
            new = new.astype(y.dtype)
            return jnp.where((v == 0) | ~jnp.isfinite(new), last, new)

        new_y = jtu.tree_map(extrapolate, at.y, at.f, second)
        return Step(new_y, state, num_evals=1)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful, state
        return y, residual, {}


Aitken.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
