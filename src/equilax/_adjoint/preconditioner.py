"""Approximate inverses of the system of a derivative, and of its transpose."""

import abc
from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import RealScalarLike
from .._misc import per_sample, transposed
from .._norm import two_norm
from .._solver import AbstractInverseEstimate
from .base import Problem


Product = Callable[[PyTree[Array]], PyTree[Array]]


class AbstractPreconditioner(eqx.Module):
    """Abstract base class for approximate inverses of $I - J$."""

    @abc.abstractmethod
    def prepare(
        self,
        problem: Problem,
        y: PyTree[Array],
        state: PyTree[Array],
        *,
        is_transposed: bool,
    ) -> Callable[[PyTree[Array]], Product]:
        """Do what does not depend on the right-hand side.

        **Arguments:**

        - `y`, `state`: The solution and the state of the solver there.
        - `is_transposed`: Whether the system is the transposed one.

        **Returns:**

        A function of the right-hand side, that returns the linear function which
        multiplies a tree like `y` by the estimate.
        """


class Given(AbstractPreconditioner):
    """That of a user, called as `fn(vector, y, args)`."""

    fn: Callable[..., PyTree[Array]]

    def prepare(self, problem, y, state, *, is_transposed):
        del state
        zero = jtu.tree_map(jnp.zeros_like, y)
        # What it computes of `y` and `args` alone is computed once.
        _, product = jax.linearize(lambda v: self.fn(v, y, problem.args), zero)
        if is_transposed:
            product = transposed(product, zero)
        return lambda _: product


class SharedInverse(AbstractPreconditioner):
    """The estimate that the solver of the forward pass has made."""

    max_growth: RealScalarLike

    def prepare(self, problem, y, state, *, is_transposed):
        del y
        each = per_sample(problem.is_batch)
        solver = cast(AbstractInverseEstimate, problem.solver)

        def multiply(state, vector):
            # The solver's is an estimate of the inverse of J - I.
            out = solver.inverse_product(state, vector, transpose=is_transposed)
            return jtu.tree_map(lambda x, v: -x.astype(v.dtype), out, vector)

        def is_sound(state, vector):
            # False where the product is not finite.
            growth = jnp.asarray(self.max_growth, jnp.float32)
            product = two_norm(multiply(state, vector), solver.axis_name)
            size = two_norm(vector, solver.axis_name)
            return product <= growth.astype(product.dtype) * size

        def choose(is_sound, state, vector):
            product = multiply(state, vector)
            return jtu.tree_map(lambda a, b: jnp.where(is_sound, a, b), product, vector)

        def product_for(vector):
            sound = each(is_sound)(state, vector)
            return lambda v: each(choose)(sound, state, v)

        return product_for
