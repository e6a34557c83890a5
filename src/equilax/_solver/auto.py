import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Scalar

from .._batching import if_wanted
from .._check import check_integer, check_tolerances
from .._custom_types import BoolScalar, IntScalar, Norm, RealScalarLike, Y
from .._dtype import residual_dtype
from .._misc import difference, tree_where
from .._norm import max_norm, two_norm
from . import descent
from .anderson import _AndersonState, Anderson
from .base import AbstractFixedPointSolver, Step
from .newton_krylov import _NewtonKrylovState, NewtonKrylov


# The methods, cheapest first but for the last, which is for what defeats the others.
_ANDERSON, _NEWTON, _PLAIN = 0, 1, 2
# Anderson is left if an evaluation reduces the residual by less than this factor,
# measured over this many steps at a time. Chosen on the problems of tests/problems.py.
_SLOW = 0.75
_WINDOW = 9
# Any slope is worse than that of what hasn't been tried.
_UNKNOWN = 1e9


class _AutoState(eqx.Module):
    anderson: _AndersonState
    newton: _NewtonKrylovState
    method: IntScalar
    # The logarithm of the factor by which each method changed the residual with each
    # evaluation, when it was last in use.
    slopes: Float[Array, "3"]
    # Of the present method: steps, evaluations, and the best residual before them.
    num_steps: IntScalar
    num_evals: IntScalar
    best: Scalar
    num_switches: IntScalar
    is_trial: BoolScalar


def _was_rejected(old: _AndersonState, new: _AndersonState) -> BoolScalar:
    total = lambda r: r.safeguard + r.nonfinite
    return total(new.rejections) > total(old.rejections)


class Auto(AbstractFixedPointSolver[Y, _AutoState]):
    r"""Anderson acceleration as long as it is fast, Newton-Krylov where it is not.

    Every solve, each sample of a batch by itself, begins with a step of the plain
    iteration and goes on with [`equilax.Anderson`][]. The solver watches by which
    factor an evaluation of `fn` reduces the residual. Where nine steps of Anderson's
    average more than 0.75 it tries a step of [`equilax.NewtonKrylov`][], and from then
    on takes the one that gains more an evaluation, measured again after each step of
    Newton's and every nine of Anderson's; where neither gains anything, the plain
    iteration. Anderson learns from every evaluation, whoever asked for it. Whenever the
    methods change far from the best iterate, the next begins there.

    Use it if you do not know your problem, or if the samples of a batch are of very
    different difficulty: nothing of Newton's is computed unless a sample of the batch
    wants it. If you know that Anderson converges in few steps take that: it needs half
    the memory. An `fn` of the whole batch (`batch_axis`) is refused.

    Adds `num_switches` and `rejections`, those of Anderson, to `stats`. Cost: that of
    the method in use. Memory: that of both, `2 * history_length + restart + 8` times
    `y`.
    """

    rtol: RealScalarLike
    atol: RealScalarLike
    norm: Norm = max_norm
    history_length: int = eqx.field(static=True, default=10)
    restart: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check_tolerances(self.rtol, self.atol)
        check_integer("history_length", self.history_length, 1)
        check_integer("restart", self.restart, 1)

    def _methods(self) -> tuple[Anderson, NewtonKrylov]:
        shared = (self.rtol, self.atol, self.norm)
        anderson = Anderson(*shared, history_length=self.history_length)
        return anderson, NewtonKrylov(*shared, restart=self.restart)

    def init(self, y, *, max_steps, state=None):
        dtype = residual_dtype(y)
        zero = jnp.zeros((), jnp.int32)
        anderson, newton = self._methods()
        old = None if state is None else state.anderson
        return _AutoState(
            anderson=anderson.init(y, max_steps=max_steps, state=old),
            newton=newton.init(y, max_steps=max_steps),
            method=zero if state is None else state.method,
            # Newton's is tried before it is known; the plain iteration after both.
            slopes=jnp.array([0.0, -_UNKNOWN, 0.0], dtype),
            num_steps=zero,
            num_evals=zero,
            best=jnp.array(jnp.inf, dtype),
            num_switches=zero,
            is_trial=jnp.array(False),
        )

    def step(self, fn, at, args, state):
        anderson, newton = self._methods()
        is_anderson, is_newton = state.method == _ANDERSON, state.method == _NEWTON
        first = anderson.step(
            fn,
            dataclasses.replace(
                at,
                is_trial=state.is_trial & is_anderson,
                is_live=at.is_live & (at.is_finite | is_anderson),
            ),
            args,
            state.anderson,
        )
        size = two_norm(difference(at.y, at.f)).astype(at.residual.dtype)
        inner = dataclasses.replace(at, is_trial=state.is_trial & is_newton)
        is_refused = descent.is_taken_back(
            newton.line_search, inner, size, state.newton.descent
        )
        is_refused = is_refused | _was_rejected(state.anderson, first.state)
        method, slopes, is_over = self._choose(at, is_refused, state)
        is_switch = method != state.method
        is_lost = is_switch & ~(at.residual <= 2 * at.best_residual)

        is_wanted = at.proceed & (method == _NEWTON) & ~is_lost
        fresh = newton.init(at.y, max_steps=1)
        operand = (
            fn,
            dataclasses.replace(inner, is_live=is_wanted, proceed=is_wanted),
            args,
            tree_where(is_switch, fresh, state.newton),
        )
        none = Step(at.y, state.newton, jnp.zeros((), jnp.int32), jnp.array(False))
        second = if_wanted(is_wanted, lambda x: newton.step(*x), operand, none)

        new_y = tree_where(method == _ANDERSON, first.y, at.f)
        new_y = tree_where(is_wanted, second.y, new_y)
        new_y = tree_where(is_lost, at.best, new_y)
        is_trial = jnp.where(method == _ANDERSON, first.is_trial, second.is_trial)
        is_trial = is_trial & ~is_lost
        is_new = is_over | jnp.isinf(state.best)
        count = lambda flag: (flag & at.proceed).astype(jnp.int32)
        rest = (
            method,
            slopes,
            jnp.where(is_new, 0, state.num_steps + 1),
            jnp.where(is_new, 0, state.num_evals + 1) + second.num_evals,
            jnp.where(is_new, at.best_residual, state.best),
            state.num_switches + count(is_switch),
            is_trial,
        )
        old = (
            state.method,
            state.slopes,
            state.num_steps,
            state.num_evals,
            state.best,
            state.num_switches,
            state.is_trial,
        )
        new = _AutoState(first.state, second.state, *tree_where(at.is_live, rest, old))
        # The plain iteration has nothing to fall back on.
        may_fail = (method != _PLAIN) | is_lost
        return Step(new_y, new, num_evals=second.num_evals, is_trial=may_fail)

    def _choose(self, at, is_refused: BoolScalar, state: _AutoState):
        """The method of the next step, the slopes, and whether they are new."""
        dtype = state.slopes.dtype
        is_begun = ~jnp.isinf(state.best)
        is_broken = ~at.is_finite & ~is_refused
        size = sum(x.size for x in jtu.tree_leaves(at.y))
        # With room for all unknowns Anderson's ends by itself, if `fn` is linear.
        is_small = size <= self.history_length
        longest = max(_WINDOW, size + 1) if is_small else _WINDOW
        window = jnp.array([longest, 1, 5 * _WINDOW], jnp.int32)[state.method]
        is_over = is_begun & ~is_refused & (state.num_steps + 1 >= window)
        is_over = is_over | is_broken
        gain = at.best_residual / jnp.where(is_begun, state.best, 1)
        gain = jnp.log(jnp.where(gain > 0, gain, 1)).astype(dtype)
        slope = gain / (state.num_evals + 1).astype(dtype)
        slope = jnp.where(is_broken, 1, slope)
        is_present = jnp.arange(3, dtype=jnp.int32) == state.method
        slopes = jnp.where(is_over & is_present, slope, state.slopes)
        # To stay is better than to go for little.
        biased = jnp.where(is_present, jnp.minimum(2 * slopes, slopes), slopes)
        method = jnp.argmin(biased).astype(jnp.int32)
        is_fast = (state.method == _ANDERSON) & (slope < jnp.log(_SLOW))
        stays = ~is_over | is_fast
        return jnp.where(stays, state.method, method), slopes, is_over

    def postprocess(self, y, residual, is_successful, state):
        del is_successful
        stats = {
            "num_switches": state.num_switches,
            "rejections": state.anderson.rejections,
        }
        return y, residual, stats


Auto.__init__.__doc__ = """**Arguments:**

- `rtol`: Relative tolerance, dimensionless. May be a traced scalar.
- `atol`: Absolute tolerance, in the units of `y`. May be a traced scalar.
- `norm`: The norm `PyTree -> Scalar` of `fn(y) - y` divided by the tolerance.
- `history_length`: The differences that Anderson's method keeps, at least 1.
- `restart`: The vectors that GMRES keeps, at least 1.
"""
