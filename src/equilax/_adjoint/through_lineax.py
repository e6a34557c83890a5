"""Solve the system of a derivative by one of Lineax's own solvers."""

from collections.abc import Callable

import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._dtype import residual_dtype, rounding
from .._linear import is_resolved
from .._mesh import any_varying
from .._misc import struct
from .._norm import divisor, max_norm
from .._solution import RESULTS
from .base import Problem
from .outcome import Outcome, singular_where
from .rule import Rule


def through_lineax(linear_solver, tags: frozenset[object]) -> Callable:
    """A function of `(mv, vector, guess)` that solves by `lineax.linear_solve`.

    Lineax's own derivative rules are not used.
    """

    def solve(mv, vector: Float[Array, " n"], guess: None) -> Outcome:
        # An iterative solver's `atol` is absolute; a derivative must not depend on the
        # scale of its cotangent.
        del guess
        unit = divisor(max_norm(vector)).astype(vector.dtype)
        operator = lx.FunctionLinearOperator(mv, struct(vector), tags)
        scaled = vector / unit
        sol = lx.linear_solve(operator, scaled, linear_solver, throw=False)
        dtype = residual_dtype(vector)
        # Gone from the compiled program, unless somebody reads it.
        relative = max_norm(scaled - mv(sol.value)).astype(dtype)
        num_steps = jnp.asarray(sol.stats.get("num_steps", 1), jnp.int32)
        stats = {
            "num_steps": num_steps,
            "num_fn_evals": num_steps,
            "max_steps": sol.stats.get("max_steps"),
            "residual": relative * unit.astype(dtype),
        }
        is_usable = sol.result == lx.RESULTS.successful
        is_lost = ~is_resolved(sol.value, max_norm(scaled), rounding(vector))
        result = singular_where(is_usable & is_lost, RESULTS.promote(sol.result))
        is_usable = is_usable & ~is_lost
        return Outcome(sol.value * unit, result, is_usable, relative, stats)

    return solve


def check_lineax(rule: Rule, rhs: PyTree[Array], problem: Problem):
    """Refuse a solver of Lineax's where it cannot run."""
    name = type(rule.linear_solver).__name__
    instead = "take `equilax.FixedPointLinearSolver` for the adjoint instead."
    if any_varying(rhs, problem):
        raise ValueError(
            f"`linear_solver={name}` runs through `lineax.linear_solve`, which does "
            f"not work inside `jax.shard_map` (Lineax 0.1.1): {instead}"
        )
    if problem.is_batch:
        raise ValueError(
            f"`linear_solver={name}` would solve one system for the whole batch of an "
            f"`fn` with a `batch_axis`: {instead}"
        )
    if problem.solver.axis_name is not None:
        raise ValueError(
            f"`linear_solver={name}` needs the whole of `y` on each device, which is "
            f"not so with `axis_name={problem.solver.axis_name!r}`: {instead}"
        )
    if problem.batching.axis_names:
        raise ValueError(
            f"`linear_solver={name}` solves for each sample by itself, which an `fn` "
            f"with a collective over a vmapped axis does not allow: {instead}"
        )
    half = [x.dtype for x in jtu.tree_leaves(rhs) if jnp.finfo(x.dtype).bits < 32]
    if half:
        raise ValueError(f"`linear_solver={name}` has no {half[0]} version: {instead}")


def real_tags(rhs: PyTree[Array], tags: frozenset[object]) -> frozenset[object]:
    """The tags that also hold of the system in real and imaginary parts."""
    definite = {lx.positive_semidefinite_tag, lx.negative_semidefinite_tag}
    is_complex = [jnp.iscomplexobj(x) for x in jtu.tree_leaves(rhs)]
    return tags & definite if any(is_complex) else tags
