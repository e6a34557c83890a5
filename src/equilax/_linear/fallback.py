import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._batching import AbstractBatching, if_wanted, Lockstep
from .._check import check_instance
from .._custom_types import AxisName, BoolScalar, Norm
from .._dtype import rounding
from .._misc import hoist, Hoisted, per_sample, tree_where
from .._norm import divisor, measured
from .._solution import RESULTS, Solution
from .base import AbstractMatrixFreeSolver, is_at_rounding
from .fixed_point import FixedPointLinearSolver
from .krylov import KrylovLinearSolver


class FallbackLinearSolver(AbstractMatrixFreeSolver):
    r"""Solve by one method, and what that one fails on by another.

    The default of an adjoint: the fixed point $u = v + (I - A) u$, which is quick and
    small where $I - A$ contracts, and GMRES where it does not. A sample that the first
    method has solved costs nothing more; a batch all of whose samples it has solved
    does not run the second.

    Of the two solutions of a sample the one of the smaller residual is returned.

    Adds `is_fallback` to `stats`: whether the second method was asked. `num_steps` and
    `num_fn_evals` are those of both.

    Cost: that of the first method, and where it fails that of the second and a product
    with $A$. Memory: that of the larger one.
    """

    first: AbstractMatrixFreeSolver = FixedPointLinearSolver(max_steps=256)
    second: AbstractMatrixFreeSolver = KrylovLinearSolver()

    def __check_init__(self):
        check_instance("first", self.first, AbstractMatrixFreeSolver)
        check_instance("second", self.second, AbstractMatrixFreeSolver)

    @property
    def norm(self):
        return self.first.norm

    def solve(
        self,
        mv,
        vector,
        *,
        tolerance,
        batching,
        is_batch=False,
        unit=None,
        axis_name=None,
    ):
        each = per_sample(is_batch)
        mv = hoist(mv, vector)
        found = self.first.solve(
            mv,
            vector,
            tolerance=tolerance,
            batching=batching,
            is_batch=is_batch,
            unit=unit,
            axis_name=axis_name,
        )
        residual = found.stats["residual"]

        def is_failed(value, result, residual, vector):
            is_good = is_at_rounding(
                value, residual, vector, rounding(vector), axis_name
            )
            is_good = is_good & (result == RESULTS.stagnation)
            return ~is_good & (result != RESULTS.successful)

        failed = each(is_failed)(found.value, found.result, residual, vector)
        old = _Ending(
            found.value,
            found.result,
            residual,
            found.stats["num_steps"],
            found.stats["num_fn_evals"],
        )

        # A loop of ours would not know the name of an axis that is vmapped.
        is_plain = batching.serves_axis_names
        again = _Again(batching if is_plain else Lockstep(), is_batch, axis_name)
        tolerance = jnp.broadcast_to(
            jnp.asarray(tolerance, residual.dtype), residual.shape
        )
        second_unit = each(lambda v: measured(self.second.norm, v, axis_name))(vector)
        if unit is not None:
            # As many times the vector in its norm as in that of the first.
            size = each(lambda v: divisor(measured(self.norm, v, axis_name)))(vector)
            second_unit = second_unit * (unit / size)
        operand = _Operand(
            self.second, mv, vector, tolerance, second_unit, failed, old, self.norm
        )
        if is_plain:
            end = again(operand)
        else:
            end = if_wanted(jnp.any(failed), again, operand, old)
        stats = {
            **found.stats,
            "num_steps": end.num_steps,
            "num_fn_evals": end.num_fn_evals,
            "residual": end.residual,
            "is_fallback": failed,
        }
        return Solution(end.value, end.result, None, stats, None)


class _Ending(eqx.Module):
    value: PyTree[Array]
    result: RESULTS
    residual: Array
    num_steps: Array
    num_fn_evals: Array


class _Operand(eqx.Module):
    solver: AbstractMatrixFreeSolver
    mv: Hoisted
    vector: PyTree[Array]
    tolerance: Array
    unit: Array
    failed: Array
    old: _Ending
    norm: Norm


def _choose(failed: BoolScalar, old: _Ending, new: _Ending) -> _Ending:
    """The better of two solutions, and the work of both."""
    # Of equals the second, which knows more of why it failed.
    is_nearer = new.residual <= old.residual
    is_nearer = is_nearer | (jnp.isfinite(new.residual) & jnp.isnan(old.residual))
    is_better = is_nearer | (new.result == RESULTS.successful)
    better = tree_where(failed & is_better, new, old)
    return dataclasses.replace(
        better,
        num_steps=old.num_steps + jnp.where(failed, new.num_steps, 0),
        num_fn_evals=old.num_fn_evals + jnp.where(failed, new.num_fn_evals, 0),
    )


class _Again(eqx.Module):
    """Solve by the second method what the first has failed on."""

    batching: AbstractBatching
    is_batch: bool
    axis_name: AxisName = eqx.field(static=True)

    def __call__(self, given: _Operand) -> _Ending:
        mv, vector, failed, old = given.mv, given.vector, given.failed, given.old
        each = per_sample(self.is_batch)

        # What has been solved gets a right-hand side of zero, and takes no step.
        def mask(failed, vector):
            return jtu.tree_map(lambda x: jnp.where(failed, x, 0), vector)

        found = given.solver.solve(
            mv,
            each(mask)(failed, vector),
            tolerance=given.tolerance,
            batching=self.batching,
            is_batch=self.is_batch,
            unit=given.unit,
            axis_name=self.axis_name,
        )
        left = jtu.tree_map(jnp.subtract, vector, mv(found.value))
        residual = each(lambda x: measured(given.norm, x, self.axis_name))(left)
        new = _Ending(
            found.value,
            found.result,
            residual.astype(old.residual.dtype),
            found.stats["num_steps"],
            found.stats["num_fn_evals"] + 1,
        )
        return each(_choose)(failed, old, new)


FallbackLinearSolver.__init__.__doc__ = """**Arguments:**

- `first`: The method to begin with.
- `second`: The method for what the first fails on.
"""
