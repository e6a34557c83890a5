import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._batching import if_wanted, Lockstep
from .._check import check_instance
from .._custom_types import BoolScalar, Norm
from .._dtype import rounding
from .._misc import hoist, Hoisted, tree_where
from .._norm import divisor
from .._solution import RESULTS, Solution
from .base import AbstractMatrixFreeSolver, is_at_rounding
from .fixed_point import FixedPointLinearSolver
from .krylov import KrylovLinearSolver
from .terms import Terms


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

    def solve(self, mv, vector, terms):
        mv = hoist(mv, vector)
        found = self.first.solve(mv, vector, terms)
        residual = found.stats["residual"]

        def is_failed(value, result, residual, vector):
            is_good = is_at_rounding(
                value, residual, vector, rounding(vector), terms.axis_name
            )
            is_good = is_good & (result == RESULTS.stagnation)
            return ~is_good & (result != RESULTS.successful)

        failed = terms.each(is_failed)(found.value, found.result, residual, vector)
        old = _Ending(
            found.value,
            found.result,
            residual,
            found.stats["num_steps"],
            found.stats["num_fn_evals"],
        )

        unit = terms.size(self.second.norm, vector)
        if terms.unit is not None:
            # As many times the vector in its norm as in that of the first.
            size = terms.each(divisor)(terms.size(self.norm, vector))
            unit = unit * (terms.unit / size)
        tolerance = jnp.asarray(terms.tolerance, residual.dtype)
        tolerance = jnp.broadcast_to(tolerance, residual.shape)
        # A loop of ours would not know the name of an axis that is vmapped.
        is_plain = terms.batching.serves_axis_names
        again = dataclasses.replace(
            terms,
            tolerance=tolerance,
            batching=terms.batching if is_plain else Lockstep(),
            unit=unit,
            fused=None,
        )
        operand = _Operand(self.second, mv, vector, again, failed, old, self.norm)
        if is_plain:
            end = _again(operand)
        else:
            end = if_wanted(jnp.any(failed), _again, operand, old)
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
    terms: Terms
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


def _again(given: _Operand) -> _Ending:
    """Solve by the second method what the first has failed on."""
    mv, vector, terms, failed = given.mv, given.vector, given.terms, given.failed

    # What has been solved gets a right-hand side of zero, and takes no step.
    def mask(failed, vector):
        return jtu.tree_map(lambda x: jnp.where(failed, x, 0), vector)

    found = given.solver.solve(mv, terms.each(mask)(failed, vector), terms)
    left = jtu.tree_map(jnp.subtract, vector, mv(found.value))
    old = given.old
    new = _Ending(
        found.value,
        found.result,
        terms.size(given.norm, left).astype(old.residual.dtype),
        found.stats["num_steps"],
        found.stats["num_fn_evals"] + 1,
    )
    return terms.each(_choose)(failed, old, new)


FallbackLinearSolver.__init__.__doc__ = """**Arguments:**

- `first`: The method to begin with.
- `second`: The method for what the first fails on.
"""
