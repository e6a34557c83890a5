"""The linear system of a derivative, and the one place that knows by which road."""

import functools as ft
from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from .._dtype import at_least_single
from .._linear import AbstractMatrixFreeSolver
from .._mesh import all_vary, any_varying, vary_over
from .._misc import struct, transposed
from .base import Problem
from .matrix_free import matrix_free
from .monitor import AdjointMonitor, as_vector
from .outcome import checked, figures_of, Outcome
from .ravelling import Ravelling, ravelling_of
from .rule import Rule
from .through_lineax import check_lineax, real_tags, through_lineax


class System(eqx.Module):
    """`(I - J) t = rhs` with `J` the Jacobian of `fn` in `y`, as vectors.

    **Attributes:**

    - `mv`: Multiplies a vector by `I - J`. `fn` has been linearised, once.
    - `solve`, `transpose_solve`: Functions of `(mv, vector, guess)` that return an
        [`Outcome`][].
    """

    mv: Callable[[Array], Array] = eqx.field(static=True)
    solve: Callable[..., Outcome] = eqx.field(static=True)
    transpose_solve: Callable[..., Outcome] = eqx.field(static=True)
    ravelling: Ravelling


def linear_system(
    rule: Rule, problem: Problem, y: PyTree[Array], state: PyTree[Array]
) -> System:
    """The system at the solution `y`, where the solver has ended in `state`."""
    _, product = jax.linearize(lambda y: problem.fn(y, problem.args), y)
    ravelling = ravelling_of(y, problem.is_batch)
    ravel, unravel = ravelling.ravel, ravelling.unravel

    def mv(t):
        # Negated before the product, which in the transpose is after it: there it is
        # part of the addition, where before a product it is a pass of its own.
        return t + ravel(product(unravel(-t)))

    if isinstance(rule.linear_solver, AbstractMatrixFreeSolver):
        constants = lax.stop_gradient((y, all_vary(state, any_varying(y))))
        both = ft.partial(matrix_free, rule, problem, *constants, ravelling)
        solve, transpose_solve = both(is_transposed=False), both(is_transposed=True)
    else:
        check_lineax(rule, y, problem)
        tags = real_tags(y, problem.tags)
        solve = through_lineax(rule.linear_solver, tags)
        transpose_solve = through_lineax(rule.linear_solver, lx.transpose_tags(tags))
    return System(mv, solve, transpose_solve, ravelling)


def checker(rule: Rule, problem: Problem) -> Callable[[Outcome], Array]:
    """What takes an outcome to the value to go on with, or raises."""
    return ft.partial(
        checked,
        throw=problem.throw,
        on_failure=rule.on_failure,
        is_batch=problem.is_batch,
        axis_name=problem.solver.axis_name,
    )


def derivative(
    rule: Rule,
    system: System,
    problem: Problem,
    rhs: PyTree[Array],
    t_monitor: AdjointMonitor | None,
) -> PyTree[Array]:
    """Solve for the derivative in the direction of `rhs`.

    Linear in `rhs`, and transposed by JAX for reverse mode.

    **Arguments:**

    - `t_monitor`: The tangent of the monitor. The solution does not depend on it, but
        in reverse mode the figures of the solve become its cotangent.
    """
    check = checker(rule, problem)
    vector = system.ravelling.ravel(rhs)

    # Linear in its right-hand side whatever happens in `solve`, for which reason the
    # check of the outcome is in there.
    def solve(mv, vector):
        return check(system.solve(mv, vector, None))

    def transpose_solve(mv, vector):
        return check(system.transpose_solve(mv, vector, None))

    if t_monitor is None or not jtu.tree_leaves(t_monitor):
        out = lax.custom_linear_solve(
            system.mv, vector, solve, transpose_solve=transpose_solve
        )
        return system.ravelling.unravel(out)
    return _watched(system, problem, vector, t_monitor, check)


def _watched(
    system: System,
    problem: Problem,
    vector: Array,
    t_monitor: AdjointMonitor,
    check: Callable[[Outcome], Array],
) -> PyTree[Array]:
    """Solve a system larger by the identity, for the tangent of the monitor.

    The cotangent of that part is whatever the transposed solve makes it: the figures,
    and the solution itself.
    """
    ravel, unravel = system.ravelling.ravel, system.ravelling.unravel
    axes = any_varying(vector, problem)
    solution = cast(AdjointMonitor, problem.monitor).solution
    guess, t_guess = None, None
    if solution is not None:
        solution = all_vary(solution, axes)
        # What was a cotangent is not ravelled as a tangent is.
        guess = lax.stop_gradient(transposed(unravel, vector)(solution))
        zero = lambda t, s: jnp.zeros_like(s) if t is None else vary_over(t, axes)
        is_none = lambda t: t is None
        t_guess = jtu.tree_map(zero, t_monitor.solution, solution, is_leaf=is_none)
        t_guess = ravel(t_guess)
    parts = (vector, vary_over(as_vector(t_monitor), axes), t_guess)
    # One vector, as JAX transposes no system of which a part has no tangent. It must
    # hold counts, which half precision does not.
    pack, unpack = _packing(parts, at_least_single(vector.dtype))

    def mv(packed):
        first, *rest = unpack(packed)
        return pack((system.mv(first), *rest))

    def solve(_, packed):
        first, *rest = unpack(packed)
        return pack((check(system.solve(system.mv, first, None)), *rest))

    def transpose_solve(transposed_mv, packed):
        first, *rest = unpack(packed)

        def first_mv(first):
            return unpack(transposed_mv(pack((first, *rest))))[0]

        outcome = system.transpose_solve(first_mv, first, guess)
        value, found = check(outcome), figures_of(outcome, problem.is_batch)
        return pack((value, found, None if guess is None else value))

    packed = vary_over(pack(parts), axes)
    out = lax.custom_linear_solve(mv, packed, solve, transpose_solve=transpose_solve)
    return unravel(unpack(out)[0])


def _packing(parts, dtype) -> tuple[Callable, Callable]:
    """To one vector of `dtype`, and back."""
    leaves, treedef = jtu.tree_flatten(parts)
    like = struct(leaves)
    ends = np.cumsum([leaf.size for leaf in like])

    def pack(parts):
        flat = [x.astype(dtype).reshape(-1) for x in jtu.tree_leaves(parts)]
        return jnp.concatenate(flat)

    def unpack(packed):
        pieces = jnp.split(packed, ends[:-1])
        pairs = zip(pieces, like, strict=True)
        leaves = [x.reshape(s.shape).astype(s.dtype) for x, s in pairs]
        return jtu.tree_unflatten(treedef, leaves)

    return pack, unpack
