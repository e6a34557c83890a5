import equinox as eqx
import jax.numpy as jnp

from .._check import check_nonnegative
from .._custom_types import RealScalarLike
from .._linear import AbstractMatrixFreeSolver, Neumann
from .._solver import AbstractInverseEstimate
from .base import Problem
from .implicit_rule import solve_implicitly
from .on_failure import OnFailure
from .preconditioner import SharedInverse
from .rule import AbstractImplicitAdjoint, check_rule, Rule


# Ramzi et al. fall back where the norm explodes; 1.8 is a growth that training bore.
_MAX_GROWTH = 1.8


class SharedInverseAdjoint(AbstractImplicitAdjoint):
    r"""Share the inverse that the forward solve has estimated (SHINE).

    [`equilax.Broyden`][] and [`equilax.BadBroyden`][] end a solve with an estimate $B$
    of $(I - J)^{-1}$. With a truncated `linear_solver` it stands in for the solve:

    - `Neumann(0)`, the default: $u = B^T v$, without a single product with $J$ (Ramzi
      et al. 2022, SHINE).
    - `Neumann(k)`: refined by `k` steps of $u \leftarrow u + B^T (v - (I - J^T) u)$.

    With one that solves to a tolerance, such as [`equilax.KrylovLinearSolver`][], it is
    the preconditioner, and the derivative is that of [`equilax.ImplicitAdjoint`][].

    Where $\|B^T v\|$ exceeds `max_growth` times $\|v\|$, the estimate is not trusted
    and replaced by the identity for that sample: the one-step, Jacobian-free gradient
    (their fallback), refined as above.

    The estimate is good in the directions in which the forward solve has stepped, and
    there are at most `history_length` of these. It knows nothing of $v$: expect errors
    of tens of percent at `Neumann(0)`, and see the table in `bench/README.md`.

    Cost: one linearisation of `fn`, `2 * history_length` passes through a `y` for each
    product with $B$, one more than the steps of the linear solver. Memory: the
    linearisation, the linear solver's, and the state of the forward solver.
    """

    linear_solver: AbstractMatrixFreeSolver = Neumann(0)
    max_growth: RealScalarLike | None = None
    on_failure: OnFailure = eqx.field(static=True, default=OnFailure.nan)

    def __check_init__(self):
        check_rule(self.linear_solver, self.on_failure)
        if not isinstance(self.linear_solver, AbstractMatrixFreeSolver):
            raise TypeError(
                "`linear_solver` must be matrix-free, such as `equilax.Neumann(0)` or "
                f"`equilax.KrylovLinearSolver()`; got {self.linear_solver!r}."
            )
        if self.max_growth is not None:
            check_nonnegative("max_growth", self.max_growth)

    def rule(self, problem: Problem) -> Rule:
        if not isinstance(problem.solver, AbstractInverseEstimate):
            raise TypeError(
                "`adjoint=SharedInverseAdjoint()` needs a `solver` with an estimate of "
                "the inverse, `equilax.Broyden` or `equilax.BadBroyden`; got "
                f"{type(problem.solver).__name__}."
            )
        growth = self.max_growth
        if growth is None:
            is_truncated = isinstance(self.linear_solver, Neumann)
            growth = _MAX_GROWTH if is_truncated else jnp.inf
        return Rule(self.linear_solver, SharedInverse(growth), self.on_failure)

    def apply(self, solve, problem):
        return solve_implicitly(solve, problem, self.rule(problem))


SharedInverseAdjoint.__init__.__doc__ = """**Arguments:**

- `linear_solver`: What the estimate is used by, a matrix-free solver.
- `max_growth`: The largest $\\|B^T v\\| / \\|v\\|$ that is trusted. `None` is 1.8 for
    [`equilax.Neumann`][], and no limit for a solver that has a tolerance.
- `on_failure`: What becomes of the derivative of a sample whose linear solve failed,
    with `throw=False`.
"""
