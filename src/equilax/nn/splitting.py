import abc
from collections.abc import Callable

import equinox as eqx
from jax import lax
from jaxtyping import Array, Float

from .._custom_types import RealScalarLike
from .monotone_map import AbstractMonotoneMap


def as_constant(alpha: RealScalarLike) -> RealScalarLike:
    """A length of step, on which a solution does not depend."""
    is_python = isinstance(alpha, (int, float))
    return alpha if is_python else lax.stop_gradient(alpha)


class AbstractSplit(eqx.Module):
    r"""Abstract base class for a splitting of one equation, with what is formed once.

    That is $z = \sigma(W z + u)$, with $W$ and $\sigma$ known, for any $u$.
    """

    @abc.abstractmethod
    def start(
        self, z: Float[Array, "..."], u: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """The iterate to begin with, for a guess `z`."""

    @abc.abstractmethod
    def step(
        self, y: Float[Array, "..."], u: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """The next iterate. Contracts in `y`."""

    @abc.abstractmethod
    def value(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """The `z` that belongs to an iterate."""


class AbstractSplitting(eqx.Module):
    """Abstract base class for operator splittings."""

    @abc.abstractmethod
    def split(
        self, map: AbstractMonotoneMap, activation: Callable[[Array], Array]
    ) -> AbstractSplit:
        """Form what all steps share."""
