import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._check import check_integer, check_nonnegative
from .._custom_types import RealScalarLike
from .._dtype import residual_dtype
from .._krylov import gmres
from .._misc import struct
from .._norm import divisor, num_elements, two_norm
from .._ravel import raveller
from .._solution import RESULTS, Solution
from .base import AbstractMatrixFreeSolver


# The recurrence that stops GMRES and the residual that judges it differ by rounding.
_SLACK = 2.0
# The memory of a large system is worth more than a step saved.
_RESTART, _RESTART_LARGE, _LARGE = 50, 20, 10_000


class KrylovLinearSolver(AbstractMatrixFreeSolver):
    r"""GMRES, restarted: solve $A u = v$ without a contraction.

    Minimises $\|v - A u\|_2$ over the span of $v, A v, A^2 v, \dots$ (Saad and Schultz
    1986, algorithm 4), with Gram and Schmidt's orthogonalisation done twice. Complex
    systems are solved in real and imaginary parts. What is returned has been tested:
    `successful` is a residual that was evaluated. With a `restart` of at least `n` it
    solves any system of `n` unknowns that is not singular. With less it may gain
    nothing in a cycle, which is `stagnation`, even for a system that is well
    conditioned: a larger `restart` is the remedy.

    Use it where $I - A$ does not contract, and a fixed point of it cannot be iterated.
    Where it does, [`equilax.FixedPointLinearSolver`][] passes through less memory. In
    `shard_map`, half precision and under `jax.export` it works, where
    [`lineax.GMRES`][] does not.

    Cost: a product with $A$ a step, and one more that tests the solution; besides,
    `4 * restart` passes through a `v` a step. Memory: `restart + 3` times `v`.
    """

    rtol: RealScalarLike | None = None
    atol: RealScalarLike = 0.0
    restart: int | None = eqx.field(static=True, default=None)
    max_steps: int = eqx.field(static=True, default=512)

    def __check_init__(self):
        if self.rtol is not None:
            check_nonnegative("rtol", self.rtol)
        check_nonnegative("atol", self.atol)
        if self.restart is not None:
            check_integer("restart", self.restart, 1)
        check_integer("max_steps", self.max_steps, 1)

    @property
    def norm(self):
        return two_norm

    def solve(self, mv, vector, terms):
        each, axis_name = terms.each, terms.axis_name
        sample = struct(vector)
        if terms.is_batch:
            cut = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            sample = jtu.tree_map(cut, sample)
        ravel, unravel = map(each, raveller(sample))
        flat = ravel(vector)
        restart = self.restart
        if restart is None:
            is_large = num_elements(sample, axis_name) > _LARGE
            restart = _RESTART_LARGE if is_large else _RESTART
        rtol = terms.tolerance if self.rtol is None else self.rtol
        dtype = residual_dtype(vector)
        limit = jnp.asarray(rtol, dtype) + jnp.asarray(self.atol, dtype)
        limit = jnp.broadcast_to(limit, flat.shape[:-1])
        size = terms.size(two_norm, flat).astype(dtype)
        if terms.unit is not None:
            limit = limit * (terms.unit.astype(dtype) / each(divisor)(size))
        end = gmres(
            lambda x: ravel(mv(unravel(x))),
            flat,
            tolerance=limit,
            restart=restart,
            max_steps=self.max_steps,
            batching=terms.batching,
            is_batch=terms.is_batch,
            axis_name=axis_name,
        )
        allowed = _SLACK * limit * size

        def judge(residual, allowed, num_steps):
            ran_out = num_steps >= self.max_steps
            result = RESULTS.where(
                ran_out, RESULTS.max_steps_reached, RESULTS.stagnation
            )
            result = RESULTS.where(residual <= allowed, RESULTS.successful, result)
            is_finite = jnp.isfinite(residual)
            return RESULTS.where(is_finite, result, RESULTS.nonfinite)

        stats = {
            "num_steps": end.num_steps,
            "num_fn_evals": end.num_steps + 1,
            "max_steps": self.max_steps,
            "residual": end.residual,
        }
        result = each(judge)(end.residual, allowed, end.num_steps)
        value = unravel(end.value.astype(flat.dtype))
        return Solution(value, result, None, stats, None)


KrylovLinearSolver.__init__.__doc__ = """**Arguments:**

- `rtol`: The residual to reach, relative to the right-hand side, both in the two-norm.
    `None` is, for an adjoint, the relative tolerance that its forward solve had.
- `atol`: Added to `rtol`: a linear solve knows no other scale than its right-hand side.
- `restart`: The vectors that are kept, at least 1. `None` is 50, and 20 for systems of
    more than 10,000 unknowns.
- `max_steps`: The most products with the matrix.
"""
