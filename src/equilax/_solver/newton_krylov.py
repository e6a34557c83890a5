import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Scalar

from .._batching import if_wanted, Lockstep
from .._check import check_fraction, check_instance, check_integer
from .._custom_types import AxisName, IntScalar, Norm, RealScalarLike, Y
from .._dtype import at_least_single, residual_dtype
from .._krylov import gmres
from .._misc import difference
from .._norm import max_norm, two_norm
from . import descent
from .base import AbstractFixedPointSolver, Step
from .descent import Descent
from .line_search import AbstractLineSearch, Backtracking


# Eisenstat and Walker's second choice, with the numbers of their section 4.
_GAMMA, _THRESHOLD = 0.9, 0.1
# No use in solving the last system better than the tolerance asks (Kelley 1995, 6.20).
_OVERSOLVED = 0.5


class _NewtonKrylovState(eqx.Module):
    descent: Descent
    forcing: Scalar


class NewtonKrylov(AbstractFixedPointSolver[Y, _NewtonKrylovState]):
    r"""Inexact Newton by GMRES, without a matrix.

    $y_{k+1} = y_k + \lambda_k d_k, \qquad
    \|g_k - (I - J_k)\, d_k\|_2 \leq \eta_k \|g_k\|_2$

    for $g_k = f(y_k) - y_k$, with $\lambda_k$ from the `line_search` and the forcing
    term $\eta_k = 0.9\, (\|g_k\| / \|g_{k-1}\|)^2$, kept from falling too fast and from
    solving beyond the tolerance (Eisenstat and Walker 1996, choice 2 and its
    safeguard). Systems are solved by restarted GMRES (Saad and Schultz 1986).

    Use it for large systems where the iteration does not contract or hardly does, and
    [`equilax.Anderson`][] stalls. Where Anderson converges it takes fewer evaluations.
    An `fn` of the whole batch (`batch_axis`) is refused. In a batch all wait in each
    step for the sample that takes most products.

    Adds `num_shortened`, the trials that the line search took back, to `stats`. Cost:
    an evaluation of `fn` and a linearisation a step, and a product with the Jacobian
    for each step of GMRES; all are counted as evaluations. Memory: `restart + 6` times
    `y` and the linearisation.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    restart: int = eqx.field(static=True, default=30)
    max_linear_steps: int = eqx.field(static=True, default=100)
    max_forcing: RealScalarLike = 0.1
    line_search: AbstractLineSearch = Backtracking()
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_integer("restart", self.restart, 1)
        check_integer("max_linear_steps", self.max_linear_steps, 1)
        check_fraction("max_forcing", self.max_forcing)
        check_instance("line_search", self.line_search, AbstractLineSearch)

    def init(self, y, *, max_steps, state=None):
        del max_steps, state
        largest = jnp.asarray(self.max_forcing, residual_dtype(y))
        return _NewtonKrylovState(descent.begin(y), largest)

    def step(self, fn, at, args, state):
        old = state.descent
        size = two_norm(difference(at.y, at.f), self.axis_name).astype(old.start.dtype)
        is_refused = descent.is_taken_back(
            self.line_search, at, size, old, self.axis_name
        )
        is_wanted = at.proceed & ~is_refused
        forcing = jnp.where(is_wanted, self._force(at, size, state), state.forcing)
        direction, num_evals = if_wanted(
            is_wanted,
            self._direct,
            (fn, at, args, forcing),
            (old.direction, jnp.zeros((), jnp.int32)),
        )
        new_y, new, is_trial = descent.follow(
            self.line_search, at, size, old, is_refused, direction, self.axis_name
        )
        state = _NewtonKrylovState(new, forcing)
        return Step(new_y, state, num_evals=num_evals, is_trial=is_trial)

    def _direct(self, operand) -> tuple[PyTree[Array], IntScalar]:
        """The direction, and the evaluations that it takes."""
        fn, at, args, forcing = operand
        system = descent.linearise(fn, at, args)
        found = gmres(
            system.mv,
            system.rhs,
            tolerance=forcing,
            restart=self.restart,
            max_steps=self.max_linear_steps,
            batching=Lockstep(),
            axis_name=self.axis_name,
        )
        wide = lambda x: x.astype(at_least_single(x.dtype))
        direction = system.unravel(found.value.astype(system.rhs.dtype))
        return jtu.tree_map(wide, direction), found.num_steps + 1

    def _force(self, at, size: Scalar, state: _NewtonKrylovState) -> Scalar:
        dtype = state.forcing.dtype
        largest = jnp.asarray(self.max_forcing, dtype)
        start = state.descent.start
        ratio = size / jnp.where(start == 0, 1, start)
        forcing = _GAMMA * ratio**2
        floor = _GAMMA * state.forcing**2
        forcing = jnp.where(floor > _THRESHOLD, jnp.maximum(forcing, floor), forcing)
        forcing = jnp.where(start == 0, largest, jnp.minimum(forcing, largest))
        enough = jnp.where(at.scaled == 0, 0, _OVERSOLVED / at.scaled)
        return jnp.minimum(jnp.maximum(forcing, enough), largest).astype(dtype)

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        return y, residual, {"num_shortened": state.descent.num_shortened}


NewtonKrylov.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `restart`: The vectors that GMRES keeps, at least 1.
- `max_linear_steps`: The most products with the Jacobian a step.
- `max_forcing`: The largest relative residual of a linear system, in [0, 1).
- `line_search`: How far to follow a direction, such as [`equilax.Backtracking`][].
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
