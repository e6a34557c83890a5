import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import AxisName, Norm, RealScalarLike, Y
from .._dtype import at_least_single, real
from .._misc import tree_allfinite, tree_where
from .._norm import max_norm, two_norm
from .base import AbstractFixedPointSolver, Step


class Squarem(AbstractFixedPointSolver[Y, None]):
    r"""Squared extrapolation (SQUAREM, scheme S3).

    With $r = f(y_k) - y_k$ and $v = f(f(y_k)) - f(y_k) - r$,

    $\alpha = -\max(1, \|r\|_2 / \|v\|_2), \qquad
    y_{k+1} = f(y_k - 2 \alpha r + \alpha^2 v)$

    (Varadhan and Roland 2008, equations 11 and 14). Where $v$ is zero, or the
    extrapolation leaves what is finite, the step is two of the plain iteration.

    Use it for monotone maps that contract slowly, such as the steps of an EM algorithm
    or of value iteration, where memory for a history is short. It needs no knobs.
    [`equilax.Anderson`][] takes fewer evaluations where both converge.

    Cost: three evaluations of `fn` a step, and one more that tests the last. Memory:
    four times `y`.
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
        wide = lambda x: x.astype(at_least_single(x.dtype))
        y, first, last = (jtu.tree_map(wide, t) for t in (at.y, at.f, second))
        r = jtu.tree_map(jnp.subtract, first, y)
        v = jtu.tree_map(lambda a, b, c: (a - b) - c, last, first, r)
        r_size, v_size = two_norm(r, self.axis_name), two_norm(v, self.axis_name)
        ratio = r_size / jnp.where(v_size == 0, 1, v_size)
        alpha = -jnp.where(v_size == 0, 1, jnp.maximum(ratio, 1))

        def extrapolate(y, r, v, like):
            a = alpha.astype(real(r.dtype)).astype(r.dtype)
            return (y - 2 * a * r + a * a * v).astype(like.dtype)

        far = jtu.tree_map(extrapolate, y, r, v, at.y)
        image = fn(far, args)
        second = tree_where(tree_allfinite(second, self.axis_name), second, at.f)
        new_y = tree_where(tree_allfinite((far, image), self.axis_name), image, second)
        return Step(new_y, state, num_evals=2)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful, state
        return y, residual, {}


Squarem.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
