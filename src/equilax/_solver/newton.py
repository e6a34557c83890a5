from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._batching import if_wanted
from .._check import check_instance
from .._custom_types import AxisName, Norm, RealScalarLike, Y
from .._dtype import at_least_single
from .._mesh import any_varying
from .._misc import difference
from .._norm import max_norm, two_norm
from . import descent
from .base import AbstractFixedPointSolver, Step
from .descent import Descent
from .line_search import AbstractLineSearch, Backtracking


class Newton(AbstractFixedPointSolver[Y, Descent]):
    r"""Newton's method, with the whole Jacobian.

    $y_{k+1} = y_k + \lambda_k d_k, \qquad (I - J(y_k))\, d_k = f(y_k) - y_k$

    with $\lambda_k$ from the `line_search` (Dennis and Schnabel 1983, algorithm
    D6.1.3). Near a solution at which $I - J$ is not singular the error is squared in
    every step. Where it is singular, and the linear solver has no finite answer, the
    step is one of the plain iteration.

    Use it for small systems, of up to a hundred unknowns or so, and where nothing else
    converges. For large ones take [`equilax.NewtonKrylov`][], which needs products
    alone; where `fn` contracts, [`equilax.Anderson`][] costs less. An `fn` of the whole
    batch (`batch_axis`) is refused.

    Adds `num_shortened`, the trials that the line search took back, to `stats`. Cost:
    for `n` unknowns an evaluation of `fn`, a linearisation and `n` products with the
    Jacobian a step, each counted as one evaluation, and the solution of a dense system.
    Memory: `n` times `y`, twice.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    linear_solver: lx.AbstractLinearSolver | None = None
    line_search: AbstractLineSearch = Backtracking()
    tags: frozenset[object] = eqx.field(static=True, default=frozenset())
    axis_name: ClassVar[AxisName] = None

    def __check_init__(self):
        if self.linear_solver is not None:
            check_instance("linear_solver", self.linear_solver, lx.AbstractLinearSolver)
        check_instance("line_search", self.line_search, AbstractLineSearch)
        check_instance("tags", self.tags, frozenset)

    def split_along(self, axis_name):
        raise ValueError(
            "`solver=Newton` needs the whole of `y` on each device, which is not so "
            f"with `axis_name={axis_name!r}`: take `equilax.NewtonKrylov`."
        )

    def init(self, y, *, max_steps, state=None):
        del max_steps, state
        return descent.begin(y)

    def step(self, fn, at, args, state):
        size = two_norm(difference(at.y, at.f)).astype(state.start.dtype)
        is_refused = descent.is_taken_back(self.line_search, at, size, state, None)
        none = (state.direction, jnp.zeros((), jnp.int32))
        direction, num_evals = if_wanted(
            at.proceed & ~is_refused,
            self._direct,
            (fn, at, args, self.linear_solver),
            none,
        )
        new_y, state, is_trial = descent.follow(
            self.line_search, at, size, state, is_refused, direction, None
        )
        return Step(new_y, state, num_evals=num_evals, is_trial=is_trial)

    def _direct(self, operand) -> tuple[PyTree[Array], Array]:
        """The direction, and what it takes."""
        fn, at, args, linear_solver = operand
        system = descent.linearise(fn, at, args)
        num_unknowns = system.rhs.size
        # Direct solvers have no half precision.
        dtype = at_least_single(system.rhs.dtype)
        unit = jnp.eye(num_unknowns, dtype=system.rhs.dtype)
        matrix = jax.vmap(system.mv, out_axes=1)(unit).astype(dtype)
        found = self._solve(linear_solver, matrix, system.rhs.astype(dtype))
        wide = lambda x: x.astype(at_least_single(x.dtype))
        direction = jtu.tree_map(wide, system.unravel(found.astype(system.rhs.dtype)))
        return direction, jnp.array(num_unknowns + 1, jnp.int32)

    def _solve(self, linear_solver: Any, matrix: Array, rhs: Array) -> Array:
        if linear_solver is None:
            return jnp.linalg.solve(matrix, rhs)
        if any_varying(matrix, rhs):
            raise ValueError(
                f"`linear_solver={type(linear_solver).__name__}` does not work "
                "inside `jax.shard_map` (Lineax 0.1.1): take `linear_solver=None`."
            )
        operator = lx.MatrixLinearOperator(matrix, self.tags)
        return lx.linear_solve(operator, rhs, linear_solver, throw=False).value

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"num_shortened": state.num_shortened}


Newton.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `linear_solver`: Any Lineax solver, which is given the matrix $I - J$. `None` is
    Gaussian elimination by `jax.numpy.linalg.solve`, which works inside `shard_map`.
- `line_search`: How far to follow a direction, such as [`equilax.Backtracking`][].
- `tags`: Lineax tags of $I - J$, for a linear solver that asks for them.
"""
