import functools as ft
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from equilax_kernels import max_residual
from jax import lax
from jaxtyping import Array, Scalar

from .._custom_types import AxisName, BoolScalar, Y
from .._dtype import real, residual_dtype
from .._mesh import from_all
from .._misc import difference, tree_allfinite
from .._norm import max_norm, measured, RelativeToNorm
from .base import AbstractFixedPointSolver
from .tolerance import tolerance_as


class Judged(eqx.Module):
    """What the stopping rules are about, of one iterate.

    **Attributes:**

    - `residual`: The norm of `f - y`, in the units of `y`.
    - `scaled`: The norm of `(f - y) / (atol + rtol * |y|)`, or that of `f - y` in units
        of `atol + rtol * size`.
    - `size`: The norm of `y`.
    - `is_within`: Whether `scaled` is below one.
    - `is_finite`: Whether all of `f` is.
    """

    residual: Scalar
    scaled: Scalar
    size: Scalar
    is_within: BoolScalar
    is_finite: BoolScalar


def _joined(parts: list[tuple[Scalar, ...]], axis_name: AxisName) -> list[Scalar]:
    """The largest of each number over all leaves, and the devices they are split on."""
    largest = [ft.reduce(jnp.maximum, numbers) for numbers in zip(*parts, strict=True)]
    if axis_name is None:
        return largest
    return list(jnp.max(from_all(jnp.stack(largest), axis_name), axis=0))


def _judge_max(solver: AbstractFixedPointSolver, y: Y, f: Y) -> Judged:
    """In the maximum norm: each leaf in one pass, which sees all that isn't finite."""
    dtype = residual_dtype(y)
    rtol, atol = tolerance_as(dtype, solver.rtol), tolerance_as(dtype, solver.atol)
    judged = [
        max_residual(a, b, rtol, atol)
        for a, b in zip(jtu.tree_leaves(y), jtu.tree_leaves(f), strict=True)
    ]
    residual, scaled, size = _joined(judged, solver.axis_name)
    return Judged(residual, scaled, size, scaled < 1, jnp.isfinite(residual))


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
    return Judged(residual, scaled, size, scaled < 1, is_finite)


def _largest_of_both(y: Array, f: Array, dtype: Any) -> tuple[Scalar, Scalar]:
    """The largest elements of `f - y` and of `y`, in one pass."""
    size = jnp.abs(y).astype(dtype)
    moved = jnp.abs(difference(y, f)).astype(dtype)
    return lax.reduce(
        (moved, size),
        (jnp.zeros((), dtype),) * 2,
        lambda a, b: tuple(map(jnp.maximum, a, b)),
        tuple(range(y.ndim)),
    )


def _judge_whole(
    solver: AbstractFixedPointSolver, norm: RelativeToNorm, y: Y, f: Y
) -> Judged:
    """In a norm in which the tolerance counts too."""
    dtype, axis_name = residual_dtype(y), solver.axis_name
    is_finite: BoolScalar = jnp.array(True)
    if norm.norm is max_norm:
        pairs = zip(jtu.tree_leaves(y), jtu.tree_leaves(f), strict=True)
        parts = [_largest_of_both(a, b, dtype) for a, b in pairs]
        residual, size = _joined(parts, axis_name)
    else:
        residual, size = (
            measured(norm, tree, axis_name).astype(dtype)
            for tree in (difference(y, f), y)
        )
        is_finite = tree_allfinite(f, axis_name)
    unit = tolerance_as(dtype, solver.atol) + tolerance_as(dtype, solver.rtol) * size
    scaled = jnp.where(residual == 0, 0, residual / jnp.where(residual == 0, 1, unit))
    # Without the quotient: a division would be a kernel of its own in each step.
    is_within = (residual == 0) | (residual < unit)
    is_finite = is_finite & jnp.isfinite(residual)
    return Judged(residual, scaled, size, is_within, is_finite)


def judge(solver: AbstractFixedPointSolver, y: Y, f: Y) -> Judged:
    """Measure the iterate `y`, with image `f`, by the norm of `solver`."""
    if solver.norm is max_norm:
        return _judge_max(solver, y, f)
    if isinstance(solver.norm, RelativeToNorm):
        return _judge_whole(solver, solver.norm, y, f)
    return _judge_norm(solver, y, f)
