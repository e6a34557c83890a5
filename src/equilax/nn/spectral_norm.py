import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .._check import (
    check_instance,
    check_integer,
    check_key,
    check_number,
    check_positive,
)
from .._custom_types import RealScalarLike
from .._dtype import at_least_single
from .parametrisation import AbstractStatefulParametrisation
from .weight_norm import rows


_NUM_AT_START = 30


def _normalise(v: Float[Array, " n"]) -> Float[Array, " n"]:
    size = jnp.linalg.norm(v)
    return jnp.where(size == 0, v, v / jnp.where(size == 0, 1, size))


def _iterate(matrix, u, num: int):
    for _ in range(num):
        u = _normalise(matrix @ _normalise(matrix.T @ u))
    return u


class SpectralNorm(AbstractStatefulParametrisation):
    r"""A weight whose two-norm is kept to a bound (Miyato et al. 2018).

    $\min(1, \mathrm{bound} / \sigma) V$, with $\sigma$ an estimate of $\|V\|_2$ by
    power iteration, which goes on from where it was: the vector is kept in an
    `equinox.nn.State`. It stands in the place of a weight, in a model made by
    `equinox.nn.make_with_state`, and [`equilax.nn.prepare_with_state`][] puts the
    weight there, once a batch and not once an evaluation. A weight within the bound is
    left alone.

    $\sigma$ comes from below, so while the weight moves the bound is exceeded by as
    much as the estimate lags behind: little as a rule, more where another singular
    value overtakes the largest. Where the bound must hold take an
    [`equilax.nn.ContractiveLinear`][]. For a kernel of a convolution it is the norm of
    the kernel as a matrix, of as many rows as there are channels put out; the
    convolution's is at most that times the root of the size of its window.

    Cost: `2 * num_iterations + 1` products with the weight once a batch.
    """

    weight: Float[Array, "rows ..."]
    index: eqx.nn.StateIndex
    inference: bool
    bound: float = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)

    def __init__(
        self,
        weight: Float[Array, "rows ..."],
        bound: RealScalarLike = 0.9,
        num_iterations: int = 5,
        inference: bool = False,
        *,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `weight`: The parameters.
        - `bound`: The largest norm, positive.
        - `num_iterations`: Of the power iteration, each time that it is prepared.
        - `inference`: Whether to leave the vector where it is; toggled by
            `equinox.nn.inference_mode`.
        - `key`: A PRNG key for where the power iteration begins. Keyword only argument.
        """
        matrix = rows(weight, "SpectralNorm").astype(at_least_single(weight.dtype))
        check_number("bound", bound)
        check_positive("bound", bound)
        check_integer("num_iterations", num_iterations, 1)
        check_instance("inference", inference, bool)
        check_key("key", key)
        u = jr.normal(key, (len(matrix),), matrix.dtype)
        self.weight = weight
        self.index = eqx.nn.StateIndex(_iterate(matrix, u, _NUM_AT_START))
        self.inference = inference
        self.bound = float(bound)
        self.num_iterations = num_iterations

    def _sigma(self, matrix, u) -> Scalar:
        # At a singular vector the derivative of |V^T u| is that of the norm.
        v = lax.stop_gradient(_normalise(matrix.T @ u))
        return jnp.einsum("i,ij,j", u, matrix, v)

    def prepare(self, state):
        dtype = self.weight.dtype
        matrix = rows(self.weight, "SpectralNorm").astype(at_least_single(dtype))
        u = state.get(self.index)
        if not self.inference:
            u = _iterate(lax.stop_gradient(matrix), u, self.num_iterations)
            state = state.set(self.index, u)
        sigma = self._sigma(matrix, u)
        is_over = sigma > self.bound
        scale = jnp.where(is_over, self.bound / jnp.where(is_over, sigma, 1), 1)
        return (scale * matrix).astype(dtype).reshape(self.weight.shape), state
