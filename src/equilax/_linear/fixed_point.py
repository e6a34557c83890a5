import dataclasses
import functools as ft
from typing import cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._check import check_instance, check_integer
from .._custom_types import AxisName
from .._dtype import real, rounding
from .._fused import iterate_fused
from .._misc import hoist
from .._norm import divisor, max_norm
from .._solution import RESULTS, Solution
from .._solver import (
    AbstractFixedPointSolver,
    AlternatingAnderson,
    Anderson,
    iterate,
    unwrapped,
)
from .base import AbstractMatrixFreeSolver, is_resolved


# That of the default solver, of a size at which half precision holds the solution: a
# power of two.
_TOLERANCE = 2.0**-8
# In units of rounding: smaller is no tolerance at all.
_LEAST = 2.0**-8


def _richardson(u, args):
    mv, vector = args
    return jtu.tree_map(lambda a, b, c: b + (a - c), u, vector, mv(u))


def _divide(tree: PyTree[Array], unit: Scalar) -> PyTree[Array]:
    return jtu.tree_map(
        lambda x: (x / unit.astype(real(x.dtype))).astype(x.dtype), tree
    )


def _multiply(tree: PyTree[Array], unit: Scalar) -> PyTree[Array]:
    return jtu.tree_map(
        lambda x: (x * unit.astype(real(x.dtype))).astype(x.dtype), tree
    )


def _default(like: AbstractFixedPointSolver | None) -> AbstractFixedPointSolver:
    """The solver of an adjoint whose forward pass was solved by `like`."""
    like = None if like is None else unwrapped(like)
    if isinstance(like, AlternatingAnderson):
        # Who takes it knows that `fn` contracts; then its transpose does too.
        return dataclasses.replace(
            like, rtol=0.0, atol=_TOLERANCE, norm=max_norm, axis_name=None
        )
    return Anderson(rtol=0.0, atol=_TOLERANCE)


def _outcome(
    axis_name: AxisName, result: RESULTS, value: PyTree[Array], size: Scalar
) -> RESULTS:
    """Singular, where a solution is so large that a vector of `size` is lost beside it.

    Its residual is then one of rounding errors alone: that of a singular system can be
    zero.
    """
    is_lost = ~is_resolved(value, size, rounding(value), axis_name)
    is_lost = is_lost & (result == RESULTS.successful)
    return RESULTS.where(is_lost, cast(RESULTS, RESULTS.singular), result)


class FixedPointLinearSolver(AbstractMatrixFreeSolver):
    r"""Solve a linear system $A u = v$ as the fixed point $u = v + (I - A) u$.

    For the adjoint of a fixed point $A = I - J^T$, and this is $u = J^T u + v$: the
    backward pass is a fixed point like the forward one, with the same contraction
    factor (Bai, Kolter and Koltun 2019, equation 8). Any solver of this library will
    do, and the solve is batched and staged as the forward one is.

    The right-hand side is divided by its largest element before the solve and the
    solution multiplied by it after, so tolerances are relative to `v`: a cotangent
    scaled by 1e-20 gives a solution scaled by 1e-20, and zero gives zero in no steps.

    Use it where $J$ contracts, or nearly so with [`equilax.Anderson`][]. Where it
    doesn't, a direct Lineax solver such as [`lineax.LU`][] serves small systems.

    Cost: a product with $A$ a step, and one more that tests the last. Memory: the
    solver's.
    """

    solver: AbstractFixedPointSolver | None = None
    max_steps: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        check_integer("max_steps", self.max_steps, 1)
        if self.solver is not None:
            check_instance("solver", self.solver, AbstractFixedPointSolver)

    @property
    def norm(self):
        return max_norm if self.solver is None else self.solver.norm

    def solve(self, mv, vector, terms):
        each, axis_name, unit = terms.each, terms.axis_name, terms.unit
        has_own_unit = unit is None
        unit = terms.size(max_norm, vector) if has_own_unit else unit
        unit = each(divisor)(unit)
        solver, scale = self.solver, jnp.ones_like(unit)
        if solver is None:
            # Under `vmap` all samples share one tolerance, each in units of its own.
            # Those of a batch have one unit, that of the strictest: nobody knows
            # whether they depend on each other.
            solver = _default(terms.like)
            tolerance = jnp.min(jnp.asarray(terms.tolerance), initial=1.0)
            tolerance = jnp.maximum(tolerance, _LEAST * rounding(vector))
            scale = scale * (tolerance / _TOLERANCE).astype(scale.dtype)
        if axis_name is not None:
            solver = solver.split_along(axis_name)
        # One after the other: their product may be out of range.
        scaled = each(_divide)(each(_divide)(vector, unit), scale)
        plain = ft.partial(
            iterate,
            _richardson,
            solver,
            scaled,  # One step from zero.
            (hoist(mv, scaled), scaled),
            max_steps=self.max_steps,
            is_batch=terms.is_batch,
            axis_names=terms.batching.axis_names,
            run=terms.batching.solve,
        )
        fused = None if terms.fused is None else terms.fused(scaled)
        end = iterate_fused(
            fused, solver, scaled, max_steps=self.max_steps, iterate=plain
        )
        is_good = end.result == RESULTS.successful
        value, residual, stats = each(solver.postprocess)(
            end.y, end.residual, is_good, end.state
        )
        size = terms.size(max_norm, scaled) if has_own_unit else 1 / scale
        result = each(ft.partial(_outcome, axis_name))(end.result, value, size)
        dtype = residual.dtype
        stats = {
            "num_steps": end.num_steps,
            "num_fn_evals": end.num_fn_evals,
            "max_steps": self.max_steps,
            "residual": residual * scale.astype(dtype) * unit.astype(dtype),
            **stats,
        }
        value = each(_multiply)(each(_multiply)(value, scale), unit)
        return Solution(value, result, None, stats, end.state)


FixedPointLinearSolver.__init__.__doc__ = """**Arguments:**

- `solver`: The fixed-point solver. Its tolerances count relative to the right-hand
    side. `None` is [`equilax.Anderson`][], or [`equilax.AlternatingAnderson`][] where
    that solved the forward pass, for an adjoint with the relative tolerance that its
    forward solve had.
- `max_steps`: The most steps to take.
"""
