import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .._batching import while_loop
from .._check import (
    check_callable,
    check_data,
    check_instance,
    check_integer,
    check_key,
)
from .._custom_types import Args, Aux, IntScalar, MaybeAuxFn, Y
from .._dtype import residual_dtype
from .._krylov.cycle import orthogonalise
from .._mesh import all_vary, any_varying
from .._misc import struct
from .._norm import divisor, two_norm
from .._ravel import raveller
from .._trace import as_state, trace, ValueOf
from .hessenberg import radius_of


class _Arnoldi(eqx.Module):
    # `J V = V H` but for the last column, with orthonormal columns in `V`, the rows of
    # `basis`; those that haven't been filled are zero, and so are those of `H`.
    basis: Float[Array, "k n"]
    hessenberg: Float[Array, "k k"]
    vector: Float[Array, " n"]
    num_filled: IntScalar


def _step(product: Callable, now: _Arnoldi) -> _Arnoldi:
    """One column more (Arnoldi 1951)."""
    column = now.num_filled
    basis = lax.dynamic_update_index_in_dim(now.basis, now.vector, column, 0)
    image = product(now.vector)
    size = two_norm(image).astype(image.dtype)
    rest, entries = orthogonalise(basis, column, image, None)
    norm = two_norm(rest).astype(image.dtype)
    # What is left of an invariant subspace is rounding, whose direction says nothing.
    is_over = norm <= 4 * float(jnp.finfo(norm.dtype).eps) * size
    norm = jnp.where(is_over, 0, norm)
    index = jnp.arange(entries.size, dtype=column.dtype)
    entries = jnp.where(index == column + 1, norm, entries)
    hessenberg = jnp.where(index[None, :] == column, entries[:, None], now.hessenberg)
    vector = jnp.where(is_over, 0, rest / divisor(norm))
    return _Arnoldi(basis, hessenberg, vector, column + 1)


@eqx.filter_jit
def _radius(fn, y, args, key, num_steps, has_aux) -> Scalar:
    hoisted, y = trace(fn, as_state(y, "y"), args, has_aux, None, "y")
    freeze = lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x
    value_of, y, args = jtu.tree_map(freeze, (ValueOf(hoisted), y, args))
    dtype: Any = residual_dtype(y)
    ravel, unravel = raveller(struct(y))
    to_vector = lambda y: ravel(y).astype(dtype)
    flat = to_vector(y)
    if flat.size == 0:
        return jnp.zeros((), dtype)
    _, product = jax.linearize(lambda x: to_vector(value_of(unravel(x), args)), flat)
    size = min(num_steps, flat.size)
    start = jr.normal(key, (flat.size,), dtype)
    axes = any_varying(flat)
    init = _Arnoldi(
        basis=jnp.zeros((size, flat.size), dtype),
        hessenberg=jnp.zeros((size, size), dtype),
        vector=start / divisor(two_norm(start).astype(dtype)),
        num_filled=jnp.zeros((), jnp.int32),
    )
    is_wanted = lambda now: now.num_filled < size
    step = ft.partial(_step, product)
    end = while_loop(is_wanted, step, all_vary(init, axes), may_vary=axes)
    return radius_of(end.hessenberg)


def spectral_radius(
    fn: MaybeAuxFn[Y, Aux],
    y: Y,
    args: Args = None,
    *,
    key: PRNGKeyArray,
    num_steps: int = 16,
    has_aux: bool = False,
) -> Scalar:
    r"""Estimate the largest magnitude of an eigenvalue of a Jacobian.

    By Arnoldi's method (1951): with the basis $V$ that `num_steps` products with
    $J = \partial f / \partial y$ span from a start at random, it is that of
    $H = V^T J V$. A complex pair is found like any other eigenvalue; the power method
    would oscillate.

    Below one the plain iteration converges from close by, with an error that falls by
    this factor a step in the long run. Above one it does not, but an accelerated solver
    may.

    It is exact, but for rounding, with as many steps as there are unknowns, or distinct
    eigenvalues. With fewer it is an estimate: of a normal $J$ from below; of others it
    may be too large as well, up to $\|J\|_2$.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a tree like `y`, as for [`equilax.fixed_point`][].
    - `y`: Where the Jacobian is taken: an equilibrium, in general.
    - `args`: Passed to `fn`.
    - `key`: A PRNG key, for the start. Keyword only argument.
    - `num_steps`: The most products. Keyword only argument.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.

    **Returns:**

    A scalar, dimensionless, in the real dtype of `y` and at least float32. Not a number
    where $J$ is not finite. Its derivative is zero: what can be trained on is
    [`equilax.jacobian_penalty`][].

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.

    Cost: a linearisation of `fn`, `num_steps` products, `2 num_steps^2` passes through
    a `y`, and QR sweeps over a matrix of that size. Memory: `num_steps + 3`
    times `y`, and the linearisation.
    """
    check_callable("fn", fn, "fn(y, args)")
    check_key("key", key)
    check_integer("num_steps", num_steps, 1)
    check_instance("has_aux", has_aux, bool)
    check_data(y=y, args=args)
    return _radius(fn, y, args, key, int(num_steps), has_aux)
