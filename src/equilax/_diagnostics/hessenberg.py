"""Eigenvalues of a small matrix, where those of a library exist on CPUs alone."""

import functools as ft
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, Float, Scalar

from .._batching import while_loop
from .._custom_types import BoolScalar, IntScalar
from .._dtype import promote
from .._mesh import all_vary, any_varying
from .._misc import tree_allfinite
from .._norm import divisor, max_norm


# Two or three sweeps an eigenvalue are what it takes.
_MAX_SWEEPS = 30
# After so many in vain comes a shift off the pattern, as in LAPACK's `zlahqr`.
_PATIENCE = 10
_EXCEPTIONAL = 0.75


class _Reduced(eqx.Module):
    # A Hessenberg matrix on its way to a triangular one, and the last row that is not
    # there yet.
    matrix: Complex[Array, "k k"]
    last: IntScalar
    num_in_vain: IntScalar
    num_sweeps: IntScalar
    is_live: BoolScalar


def _is_split(matrix: Complex[Array, "k k"]) -> Bool[Array, " k"]:
    """Where the entry to the left of the diagonal is nothing but rounding."""
    eps = float(jnp.finfo(matrix.dtype).eps)
    size = jnp.abs(jnp.diagonal(matrix))
    near = size[1:] + size[:-1]
    near = jnp.where(near == 0, 1, near)  # The matrix has a largest entry of one.
    is_small = jnp.abs(jnp.diagonal(matrix, -1)) <= eps * near
    return jnp.concatenate([jnp.ones_like(is_small, shape=(1,)), is_small])


def _shift(matrix: Complex[Array, "k k"], last: IntScalar, num_in_vain: IntScalar):
    """The eigenvalue of the last two rows and columns next to the last entry."""
    index = jnp.maximum(last - 1, 0)
    block = lax.dynamic_slice(matrix, (index, index), (2, 2))
    (a, b), (c, d) = block
    half = (a - d) / 2
    root = jnp.sqrt(half * half + b * c)
    larger = jnp.where(jnp.abs(half + root) >= jnp.abs(half - root), root, -root)
    larger = half + larger
    is_zero = larger == 0
    wilkinson = jnp.where(is_zero, d, d - b * c / jnp.where(is_zero, 1, larger))
    other = d + (_EXCEPTIONAL * jnp.abs(c)).astype(d.dtype)
    return jnp.where(num_in_vain % _PATIENCE == _PATIENCE - 1, other, wilkinson)


def _rotate(first: IntScalar, last: IntScalar, shift, i: IntScalar, matrix):
    """One rotation of a sweep, from both sides (Francis 1961)."""
    size = matrix.shape[0]
    at = lambda row, column: lax.dynamic_slice(matrix, (row, column), (1, 1))[0, 0]
    before = jnp.maximum(i - 1, 0)
    is_first = i == first
    x = jnp.where(is_first, at(i, i) - shift, at(i, before))
    y = jnp.where(is_first, at(i + 1, i), at(i + 1, before))
    length = jnp.hypot(jnp.abs(x), jnp.abs(y))
    is_idle = (i < first) | (i >= last) | (length == 0)
    length = divisor(length).astype(x.dtype)
    c, s = jnp.where(is_idle, 1, x / length), jnp.where(is_idle, 0, y / length)

    upper, lower = lax.dynamic_slice(matrix, (i, 0), (2, size))
    rows = jnp.stack([jnp.conj(c) * upper + jnp.conj(s) * lower, c * lower - s * upper])
    matrix = lax.dynamic_update_slice(matrix, rows, (i, 0))
    left, right = lax.dynamic_slice(matrix, (0, i), (size, 2)).T
    columns = jnp.stack(
        [c * left + s * right, jnp.conj(c) * right - jnp.conj(s) * left], axis=1
    )
    return lax.dynamic_update_slice(matrix, columns, (0, i))


def _sweep(now: _Reduced) -> _Reduced:
    size = now.matrix.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    is_split = _is_split(now.matrix)
    last = jnp.max(jnp.where(is_split, 0, index))
    first = jnp.max(jnp.where(is_split & (index < last), index, 0))
    num_in_vain = jnp.where(last == now.last, now.num_in_vain + 1, 0)
    rotate = ft.partial(_rotate, first, last, _shift(now.matrix, last, num_in_vain))
    matrix = lax.fori_loop(0, size - 1, rotate, now.matrix)
    # What the rotations have made zero, but for rounding.
    matrix = jnp.triu(matrix, -1)
    is_live = ~jnp.all(_is_split(matrix)) & tree_allfinite(matrix)
    return _Reduced(matrix, last, num_in_vain, now.num_sweeps + 1, is_live)


def radius_of(matrix: Float[Array, "k k"]) -> Scalar:
    """The largest magnitude of an eigenvalue of a Hessenberg matrix.

    By QR sweeps with a single shift, in complex arithmetic, without a library call.

    **Returns:**

    A scalar in the dtype of `matrix`, not a number if an element is.

    Cost: two or three sweeps of `k` rotations for each of the `k` eigenvalues.
    """
    dtype = matrix.dtype
    if matrix.shape == (1, 1):
        return jnp.abs(matrix[0, 0])
    norm = max_norm(matrix).astype(dtype)
    scaled = matrix / divisor(norm)
    as_complex = scaled.astype(promote(dtype, jnp.complex64))
    zero = jnp.zeros((), jnp.int32)
    is_live = ~jnp.all(_is_split(as_complex)) & tree_allfinite(scaled)
    init = _Reduced(as_complex, zero, zero, zero, is_live)
    axes = any_varying(matrix)
    most: Any = _MAX_SWEEPS * matrix.shape[0]
    is_wanted = lambda now: now.is_live & (now.num_sweeps < most)
    end = while_loop(is_wanted, _sweep, all_vary(init, axes), may_vary=axes)
    radius = norm * jnp.max(jnp.abs(jnp.diagonal(end.matrix)))
    is_known = jnp.all(_is_split(end.matrix)) & jnp.isfinite(norm)
    return jnp.where(is_known, radius, jnp.nan)
