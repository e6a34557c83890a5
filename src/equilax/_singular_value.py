"""The largest singular value of a linear function, from a few products with it."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Scalar

from ._batching import while_loop
from ._custom_types import BoolScalar, IntScalar
from ._mesh import all_vary, any_varying, vary_over
from ._misc import transposed
from ._norm import divisor, two_norm


Entries: TypeAlias = tuple[Float[Array, " k"], Float[Array, " k"]]
# The probability, over starts, of a bound that is too small.
_RISK = 1e-3
# The bracket of a bound shrinks by this factor a pass.
_NUM_PARTS = 32


class _Bidiagonal(eqx.Module):
    # `J V = U B` with orthonormal columns in `V`, the rows of `basis`, and in `U`, of
    # which the last is kept. `alphas` is the diagonal of `B`, and `betas[i]` the entry
    # to the right of `alphas[i]`, the last of them outside of `B`.
    basis: Float[Array, "k n"]
    left: Float[Array, " m"]
    right: Float[Array, " n"]
    alphas: Float[Array, " k"]
    betas: Float[Array, " k"]
    beta: Scalar
    num_filled: IntScalar
    is_live: BoolScalar


def start_vector(size: int, dtype: Any) -> Float[Array, " n"]:
    """A vector of length one in a direction at random, the same one in every call."""
    vector = jr.normal(jr.key(0, impl="threefry2x32"), (size,), dtype)
    return vector / divisor(two_norm(vector))


def _step(product: Callable, transposed: Callable, now: _Bidiagonal) -> _Bidiagonal:
    """One column more (Golub and Kahan 1965).

    Only `V` is orthogonalised again, which is enough (Simon and Zha 2000).
    """
    exact = lax.Precision.HIGHEST
    dtype = now.right.dtype
    index = jnp.arange(now.alphas.size, dtype=jnp.int32)
    is_here = index == now.num_filled
    basis = jnp.where(is_here[:, None], now.right[None], now.basis)
    left = product(now.right) - now.beta * now.left
    alpha = two_norm(left).astype(dtype)
    left = left / divisor(alpha)
    right = transposed(left) - alpha * now.right
    for _ in range(2):
        overlap = jnp.matmul(basis, right, precision=exact)
        right = right - jnp.matmul(overlap, basis, precision=exact)
    beta = two_norm(right).astype(dtype)
    alphas = jnp.where(is_here, alpha, now.alphas)
    betas = jnp.where(is_here, beta, now.betas)
    size = jnp.maximum(jnp.max(alphas), jnp.max(betas))
    # Also false where something is not a number.
    is_live = beta > float(jnp.finfo(dtype).eps) * size
    right = right / divisor(beta)
    num_filled = now.num_filled + 1
    return _Bidiagonal(basis, left, right, alphas, betas, beta, num_filled, is_live)


def _exceeds(
    t: Float[Array, " p"],
    diagonal: Float[Array, " k"],
    couplings: Float[Array, " k"],
    level: Scalar,
) -> Array:
    """Whether `t` is above the eigenvalues of a tridiagonal matrix `T`, and far enough.

    Which is `log det(t - T) >= level`, with the pivots of its factorisation positive.
    """

    def body(carry, row):
        pivot, log_det, is_above = carry
        entry, coupling = row
        pivot = t - entry - coupling**2 / pivot
        is_above = is_above & (pivot > 0)
        log_det = log_det + jnp.log(jnp.where(is_above, pivot, 1))
        return (pivot, log_det, is_above), None

    init = (jnp.ones_like(t), jnp.zeros_like(t), t == t)
    inner = jnp.concatenate([jnp.zeros_like(couplings[:1]), couplings[:-1]])
    (_, log_det, is_above), _ = lax.scan(body, init, (diagonal, inner))
    return is_above & (log_det >= level)


def bound_from(entries: Entries, size: int) -> Scalar:
    r"""The bound of Hochstenbach (2013) from the entries of a bidiagonal matrix.

    With $T = B^T B$ and $p(t) = \det(t - T) / \prod_i \alpha_i \beta_i$, the vector
    after the last is $p(J^T J)$ times the first, and has length one. So
    $|p(\sigma^2)| \leq 1 / \delta$ for the largest singular value, if the first vector
    has a component of at least $\delta$ along its singular vector, and $p$ increases
    above the eigenvalues of $T$. Where the vectors have come to an end the product is
    zero, and the bound the root of the largest eigenvalue.

    **Arguments:**

    - `entries`: Of [`bidiagonalise`][].
    - `size`: The number of elements in what the function takes.

    **Returns:**

    A scalar in the units of a product. Not finite if a product was not.
    """
    alphas, betas = entries
    dtype = alphas.dtype
    unit = divisor(jnp.maximum(jnp.max(alphas), jnp.max(betas)))
    alphas, betas = alphas / unit, betas / unit
    diagonal = alphas**2 + jnp.concatenate([jnp.zeros_like(betas[:1]), betas[:-1] ** 2])
    couplings = alphas * betas
    # A component of a direction at random is less than `share` in magnitude with a
    # probability of at most `share * sqrt(2 size / pi)`.
    share = min(_RISK * math.sqrt(math.pi / (2 * size)), 1.0)
    level = jnp.sum(jnp.log(couplings)) - math.log(share)
    # Above the discs of Gershgorin, by as much as the level asks of each factor.
    high = jnp.max(diagonal) + 2 * jnp.max(couplings) + jnp.exp(level / alphas.size)
    parts = jnp.arange(1, _NUM_PARTS, dtype=dtype) / _NUM_PARTS

    def narrow(_, bracket):
        low, high = bracket
        t = low + (high - low) * parts
        is_enough = _exceeds(t, diagonal, couplings, level)
        new_low = jnp.max(jnp.where(is_enough, low, t))
        return new_low, jnp.min(jnp.where(is_enough, t, high))

    # Twelve bits more than the mantissa, for brackets that begin far too wide.
    bits = jnp.finfo(dtype).nmant + 12
    num_passes = math.ceil(bits / math.log2(_NUM_PARTS))
    _, high = lax.fori_loop(0, num_passes, narrow, (jnp.zeros_like(high), high))
    return unit * jnp.sqrt(high)


def bidiagonalise(
    product: Callable[[Array], Array],
    transposed: Callable[[Array], Array],
    like: tuple[Float[Array, " n"], Float[Array, " m"]],
    num_steps: int,
) -> Entries:
    r"""The bidiagonal matrix of a linear function, from a start at random.

    **Arguments:**

    - `product`: A linear function of real vectors.
    - `transposed`: Its transpose.
    - `like`: What goes into `product`, and what comes out: shapes, one dtype, and the
        mesh axes over which either varies.
    - `num_steps`: The most products with each of the two.

    **Returns:**

    The diagonal, and the entries to the right of it, the last one included. Zero from
    where there is nothing left.

    Cost: `num_steps` products with each, and four passes through `num_steps` vectors
    for each. Memory: `num_steps + 2` vectors of the size that `product` takes.
    """
    right, left = like
    dtype, size = right.dtype, right.size
    num_steps = min(num_steps, size)
    axes = any_varying(like)
    zeros = vary_over(jnp.zeros((num_steps,), dtype), axes)
    if left.size == 0:
        return zeros, zeros
    step = ft.partial(_step, product, transposed)
    is_live = lambda now: now.is_live & (now.num_filled < num_steps)
    init = _Bidiagonal(
        basis=jnp.zeros((num_steps, size), dtype),
        left=jnp.zeros_like(left),
        right=start_vector(size, dtype),
        alphas=zeros,
        betas=zeros,
        beta=jnp.zeros((), dtype),
        num_filled=jnp.zeros((), jnp.int32),
        is_live=jnp.array(True),
    )
    init = all_vary(init, axes)
    end = while_loop(is_live, step, init, may_vary=axes)
    return end.alphas, end.betas


def linear_pair(
    fn: Callable[[Array], Array], x: Float[Array, " n"]
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The derivative of `fn` at `x` as a linear function, and its transpose."""
    _, product = jax.linearize(fn, x)
    return product, transposed(product, x)
