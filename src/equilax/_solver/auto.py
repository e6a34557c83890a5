import dataclasses
import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._check import check_integer
from .._custom_types import AxisName, BoolScalar, IntScalar, Norm, RealScalarLike, Y
from .._dtype import residual_dtype
from .._misc import difference, tree_where
from .._norm import max_norm, num_elements, two_norm
from . import descent, phase
from .anderson import _AndersonState, Anderson
from .base import AbstractFixedPointSolver, Step
from .newton_krylov import _NewtonKrylovState, NewtonKrylov
from .phase import Phase


# The methods, cheapest first but for the last, which is for what defeats the others.
_ANDERSON, _NEWTON, _PLAIN = 0, 1, 2
# Anderson is left if an evaluation reduces the residual by less than this factor,
# measured over this many steps at a time. Chosen on the problems of tests/problems.py.
_SLOW = 0.75
_WINDOW = 9
# Where Anderson is slow a system is worth solving further than it needs at first.
_FORCING = 0.01
# A solve that led astray so often has ended.
_PATIENCE = 20


class _AutoState(eqx.Module):
    anderson: _AndersonState
    newton: _NewtonKrylovState
    phase: Phase
    num_switches: IntScalar
    # Whether the present method called the iterate one.
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
    Newton's and every nine of Anderson's. What gains nothing, or leads to where `fn`
    has no value, gives way to the next, and after both to the plain iteration. Anderson
    learns from every evaluation, whoever asked for it. If the method changes far from
    the best iterate, the next begins there.

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
    restart: int = eqx.field(static=True, default=30)
    axis_name: AxisName = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_integer("history_length", self.history_length, 1)
        check_integer("restart", self.restart, 1)

    def _methods(self) -> tuple[Anderson, NewtonKrylov]:
        shared = (self.rtol, self.atol, self.norm)
        anderson = Anderson(
            *shared, history_length=self.history_length, axis_name=self.axis_name
        )
        newton = NewtonKrylov(
            *shared,
            restart=self.restart,
            max_forcing=_FORCING,
            axis_name=self.axis_name,
        )
        return anderson, newton

    def init(self, y, *, max_steps, state=None):
        zero = jnp.zeros((), jnp.int32)
        anderson, newton = self._methods()
        old = None if state is None else state.anderson
        return _AutoState(
            anderson=anderson.init(y, max_steps=max_steps, state=old),
            newton=newton.init(y, max_steps=max_steps),
            phase=phase.begin(3, residual_dtype(y)),
            num_switches=zero,
            is_trial=jnp.array(False),
        )

    def step(self, fn, at, args, state):
        anderson, newton = self._methods()
        is_anderson = state.phase.method == _ANDERSON
        is_newton = state.phase.method == _NEWTON
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
        size = two_norm(difference(at.y, at.f), self.axis_name)
        size = size.astype(at.residual.dtype)
        inner = dataclasses.replace(at, is_trial=state.is_trial & is_newton)
        is_refused = descent.is_taken_back(
            newton.line_search, inner, size, state.newton.descent, self.axis_name
        )
        is_refused = is_refused | _was_rejected(state.anderson, first.state)
        new = phase.advance(
            state.phase, at, is_refused, self._windows(at.y), math.log(_SLOW)
        )
        is_switch = new.method != state.phase.method
        is_lost = is_switch & ~(at.residual <= 2 * at.best_residual)

        is_wanted = at.proceed & (new.method == _NEWTON) & ~is_lost
        inner = dataclasses.replace(inner, is_live=is_wanted, proceed=is_wanted)
        old = tree_where(
            is_switch & at.is_live, newton.init(at.y, max_steps=1), state.newton
        )
        second = newton.step(fn, inner, args, old)

        new_y = tree_where(new.method == _ANDERSON, first.y, at.f)
        new_y = tree_where(is_wanted, second.y, new_y)
        new_y = tree_where(is_lost, at.best, new_y)
        is_trial = jnp.where(new.method == _ANDERSON, first.is_trial, second.is_trial)
        is_trial = is_trial & ~is_lost & (new.method != _PLAIN)
        num_evals = jnp.where(is_wanted, second.num_evals, 0)
        new = dataclasses.replace(new, num_evals=new.num_evals + num_evals)
        num_switches = state.num_switches + (is_switch & at.proceed).astype(jnp.int32)
        rest = (new, num_switches, is_trial)
        kept = (state.phase, state.num_switches, state.is_trial)
        rest = tree_where(at.is_live, rest, kept)
        # Whatever it leads to, there is another method and the best iterate.
        may_fail = new.num_broken < _PATIENCE
        return Step(
            new_y,
            _AutoState(first.state, second.state, *rest),
            num_evals=num_evals,
            is_trial=may_fail,
        )

    def _windows(self, y: Y) -> Array:
        """After how many steps each method is measured."""
        size = num_elements(y, self.axis_name)
        # With room for all unknowns Anderson's ends by itself, if `fn` is linear.
        is_small = size <= self.history_length
        longest = max(_WINDOW, size + 1) if is_small else _WINDOW
        return jnp.array([longest, 1, 2 * _WINDOW], jnp.int32)

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
- `axis_name`: The mesh axes along which each leaf of `y` is split, one part a device,
    inside `jax.shard_map`. `None` is a `y` that is whole.
"""
