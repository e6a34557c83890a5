import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from equilax_kernels import max_residual
from jaxtyping import Scalar

from .._custom_types import BoolScalar, Y
from .._dtype import real, residual_dtype
from .._mesh import from_all
from .._misc import difference, tree_allfinite
from .._norm import max_norm, measured
from .base import AbstractFixedPointSolver
from .tolerance import tolerance_as


class Judged(eqx.Module):
    """What the stopping rules are about, of one iterate.

    **Attributes:**

    - `residual`: The norm of `f - y`, in the units of `y`.
    - `scaled`: The norm of `(f - y) / (atol + rtol * |y|)`.
    - `size`: The norm of `y`.
    - `is_finite`: Whether all of `f` is.
    """

    residual: Scalar
    scaled: Scalar
    size: Scalar
    is_finite: BoolScalar


def _judge_max(solver: AbstractFixedPointSolver, y: Y, f: Y) -> Judged:
    """In the maximum norm: each leaf in one pass, which sees all that isn't finite."""
    dtype = residual_dtype(y)
    rtol, atol = tolerance_as(dtype, solver.rtol), tolerance_as(dtype, solver.atol)
    judged = [
        max_residual(a, b, rtol, atol)
        for a, b in zip(jtu.tree_leaves(y), jtu.tree_leaves(f), strict=True)
    ]
    largest = [ft.reduce(jnp.maximum, parts) for parts in zip(*judged, strict=True)]
    if solver.axis_name is not None:
        largest = jnp.max(from_all(jnp.stack(largest), solver.axis_name), axis=0)
    residual, scaled, size = largest
    return Judged(residual, scaled, size, jnp.isfinite(residual))


def _judge_norm(solver: AbstractFixedPointSolver, y: Y, f: Y) -> Judged:
    """In any norm, of which it is not known what it sees."""

    # Where an element doesn't move at all the quotient is zero, whatever the unit:
    # zero is converged even at `atol=0`.
    def scale(d, a):
        dtype = real(d.dtype)
        size = jnp.abs(a).astype(dtype)
        unit = (
            tolerance_as(dtype, solver.atol) + tolerance_as(dtype, solver.rtol) * size
        )
        return jnp.where(d == 0, 0, d / jnp.where(d == 0, 1, unit).astype(d.dtype))

    moved = difference(y, f)
    residual, scaled, size = (
        measured(solver.norm, tree, solver.axis_name).astype(residual_dtype(y))
        for tree in (moved, jtu.tree_map(scale, moved, y), y)
    )
    is_finite = jnp.isfinite(residual) & tree_allfinite(f, solver.axis_name)
    return Judged(residual, scaled, size, is_finite)


def judge(solver: AbstractFixedPointSolver, y: Y, f: Y) -> Judged:
    """Measure the iterate `y`, with image `f`, by the norm of `solver`."""
    if solver.norm is max_norm:
        return _judge_max(solver, y, f)
    return _judge_norm(solver, y, f)
