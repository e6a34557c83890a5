from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._check import check_fraction
from .._custom_types import AxisName, Norm, RealScalarLike, Y
from .._dtype import real
from .._norm import max_norm
from .base import AbstractFixedPointSolver, Step


_State: TypeAlias = None


def damped(damp: RealScalarLike, y: Y, f: Y) -> Y:
    """`(1 - damp) * f + damp * y`, and exactly `f` where `damp` is zero."""

    def mix(a, b):
        weight = jnp.asarray(damp, real(b.dtype)).astype(b.dtype)
        return (1 - weight) * b + weight * a

    return (
        f if isinstance(damp, (int, float)) and damp == 0 else jtu.tree_map(mix, y, f)
    )


class FixedPointIteration(AbstractFixedPointSolver[Y, _State]):
    r"""Damped fixed-point iteration (Picard; Krasnoselskii-Mann).

    $y_{k+1} = (1 - d) f(y_k) + d y_k$, with $d$ the `damp` (Mann 1953; Krasnoselskii
    1955). The error falls by the contraction factor of $f$ a step.

    Use it where `fn` contracts well, by a factor of 0.7 or better; its steps are the
    cheapest there are. Damping helps where the Jacobian has eigenvalues near -1 or
    below, down to $-(1 + d) / (1 - d)$. Close to a factor of one, take
    [`equilax.Anderson`][].

    Cost: one evaluation of `fn` a step, and one more that tests the last. Memory: one
    `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    damp: RealScalarLike = 0.0
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_fraction("damp", self.damp)

    def init(self, y, *, max_steps, state=None):
        del y, max_steps, state
        return None

    def step(self, fn, at, args, state):
        del fn, args
        return Step(damped(self.damp, at.y, at.f), state)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful, state
        return y, residual, {}


FixedPointIteration.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `damp`: The damping, in [0, 1). Zero is the plain iteration.
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
