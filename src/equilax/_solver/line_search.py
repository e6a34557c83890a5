import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Scalar

from .._check import check_fraction, check_nonnegative
from .._custom_types import BoolScalar, IntScalar, RealScalarLike


class AbstractLineSearch(eqx.Module):
    """Abstract base class for how far to go along a direction.

    A search takes one evaluation of `fn` a trial, and each trial is a step of the
    solve: a batch of solves, each at a different trial, stays one batch.
    """

    @abc.abstractmethod
    def accepts(
        self, residual: Scalar, start: Scalar, length: Scalar, num_steps: IntScalar
    ) -> BoolScalar:
        """Whether to stay at a trial, which no residual that isn't a number is.

        **Arguments:**

        - `residual`: The norm of the residual at the trial.
        - `start`: That from where the search began.
        - `length`: Of the step, in multiples of the direction.
        - `num_steps`: The steps of the solve so far.
        """

    @abc.abstractmethod
    def shorten(self, length: Scalar) -> Scalar:
        """The length of the next trial."""

    @abc.abstractmethod
    def is_trial(self, length: Scalar) -> BoolScalar:
        """Whether a step of this length may be taken back."""


class FullStep(AbstractLineSearch):
    """No search: the whole step, whatever it leads to."""

    def accepts(self, residual, start, length, num_steps):
        del start, length, num_steps
        return jnp.full(residual.shape, True)

    def shorten(self, length):
        return length

    def is_trial(self, length):
        return jnp.full(length.shape, False)


class Backtracking(AbstractLineSearch):
    r"""Halve the step until the residual falls.

    A step of length $\lambda$ from $y_k$ is accepted if

    $\|g(y_k + \lambda d)\| \leq \left(1 + \frac{\eta}{(k + 1)^2}
    - \alpha \lambda \right) \|g(y_k)\|$

    with $\alpha$ the `decrease` and $\eta$ the `growth` (Dennis and Schnabel 1983,
    algorithm A6.3.1; Li and Fukushima 2000, equation 2.4, for a sum of growths that is
    finite). What is not finite is never accepted. At `min_length` the search gives up,
    and takes the step.

    Use it with [`equilax.Newton`][] and [`equilax.NewtonKrylov`][] far from a solution.
    [`equilax.Broyden`][], whose residual need not fall in every step, wants a `growth`
    of one and room for the trials in its history, and often converges sooner without a
    search. Cost: an evaluation of `fn` a trial.
    """

    decrease: RealScalarLike = 1e-4
    factor: RealScalarLike = 0.5
    growth: RealScalarLike = 0.0
    min_length: RealScalarLike = 1e-3

    def __check_init__(self):
        check_fraction("decrease", self.decrease)
        check_fraction("factor", self.factor)
        check_nonnegative("growth", self.growth)
        check_fraction("min_length", self.min_length)

    def accepts(self, residual, start, length, num_steps):
        dtype = residual.dtype
        allowed = jnp.asarray(self.growth, dtype) / (1 + num_steps.astype(dtype)) ** 2
        required = jnp.asarray(self.decrease, dtype) * length
        is_less = residual <= (1 + allowed - required) * start
        return is_less | ~self.is_trial(length)

    def shorten(self, length):
        return length * jnp.asarray(self.factor, length.dtype)

    def is_trial(self, length):
        return length > jnp.asarray(self.min_length, length.dtype)


Backtracking.__init__.__doc__ = """**Arguments:**

- `decrease`: The least relative decrease of the residual for a full step, in [0, 1).
- `factor`: By which a step is shortened, in [0, 1).
- `growth`: The relative growth of the residual allowed in the first step. It falls
    with the square of the steps.
- `min_length`: Where to stop shortening, in multiples of the full step.
"""
