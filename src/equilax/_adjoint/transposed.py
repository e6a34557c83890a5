"""The transposed system by itself: the linear solve of a backward pass."""

from collections.abc import Callable

import equinox as eqx
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._mesh import all_vary, any_varying, vary_over, varying
from .._misc import transposed
from .base import Problem
from .linear_system import checker, System
from .monitor import AdjointMonitor
from .outcome import figures_of
from .rule import Rule


def as_cotangents(cts: PyTree[Array], primals: PyTree[Array]) -> PyTree[Array]:
    """Cotangents in the dtypes of the primals, summed over devices that share those."""

    def convert(ct, primal):
        shared = tuple(sorted(varying(ct) - varying(primal)))
        ct = lax.psum(ct, shared) if shared else ct
        return vary_over(ct.astype(primal.dtype), varying(primal))

    return jtu.tree_map(convert, cts, primals)


class Transposed(eqx.Module):
    """`(I - J^T) u = v`, between trees like `y`.

    **Attributes:**

    - `to_vector`, `from_vector`: From a cotangent to the vector of the system, and from
        its solution. By the conventions of JAX these are not those of a tangent.
    - `mv`: Multiplies a vector by `I - J^T`.
    """

    to_vector: Callable[[PyTree[Array]], Array] = eqx.field(static=True)
    from_vector: Callable[[Array], PyTree[Array]] = eqx.field(static=True)
    mv: Callable[[Array], Array] = eqx.field(static=True)


def transpose_system(system: System, y: PyTree[Array]) -> Transposed:
    ravel, unravel = system.ravelling.ravel, system.ravelling.unravel
    vector = ravel(y)
    return Transposed(
        transposed(unravel, vector),
        transposed(ravel, y),
        transposed(system.mv, vector),
    )


def settle_adjoint(
    rule: Rule, system: System, problem: Problem, y: PyTree[Array], ct: PyTree[Array]
) -> tuple[PyTree[Array], AdjointMonitor | None]:
    """The solution for the cotangent `ct`, and the cotangent of the monitor."""
    flipped, monitor = transpose_system(system, y), problem.monitor
    check = checker(rule, problem)
    guess = None
    if monitor is not None and monitor.solution is not None:
        axes = any_varying(y)
        solution = all_vary(monitor.solution, axes)
        guess = lax.stop_gradient(flipped.to_vector(solution))

    def solve(mv, vector):
        outcome = system.transpose_solve(mv, vector, guess)
        return check(outcome), figures_of(outcome, problem.is_batch)

    def transpose_solve(mv, vector):
        outcome = system.solve(mv, vector, None)
        return check(outcome), figures_of(outcome, problem.is_batch)

    u, found = lax.custom_linear_solve(
        flipped.mv,
        flipped.to_vector(ct),
        solve,
        transpose_solve=transpose_solve,
        has_aux=True,
    )
    value = flipped.from_vector(u)
    if monitor is None:
        return value, None
    cts = AdjointMonitor(*found, solution=None if guess is None else value)
    return value, as_cotangents(cts, monitor)
