"""Anderson's step, of every row by itself: that of `equilax.Anderson`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..spd_solve.reference import solve_written_out
from .rules import Evaluation, Knobs


# A weight this much larger than the residual moves by rounding errors alone.
_LARGEST = 1e8


class Memory(NamedTuple):
    """What a step learns from.

    The rings hold `m` differences of residuals and of images, each divided by the
    residual of its step; how, is the backend's. `gram` is the lower triangle of their
    inner products, row by row. `last_*` are of the last evaluation that was not taken
    back.
    """

    d_residuals: Any
    d_images: Any
    gram: tuple[Float[Array, "rows 1"], ...]
    num_used: Int[Array, "rows 1"]
    last_residual: Float[Array, "rows d"]
    last_image: Float[Array, "rows d"]
    last_norm: Float[Array, "rows 1"]


# Puts a row into a slot of a ring: the ring as it is then, and all its rows.
Put = Callable[[Any, Array, Array], tuple[Any, Iterable[Array]]]


def gram_size(history_length: int) -> int:
    return history_length * (history_length + 1) // 2


def empty(
    rings: tuple[Any, Any], history_length: int, like: Float[Array, "rows d"]
) -> Memory:
    """A memory of nothing, for iterates `like` these, already in the wide dtype."""
    zero = jnp.zeros(like.shape, like.dtype)
    column = jnp.zeros((like.shape[0], 1), like.dtype)
    return Memory(
        *rings,
        gram=(column,) * gram_size(history_length),
        num_used=jnp.zeros(column.shape, jnp.int32),
        last_residual=zero,
        last_image=zero,
        last_norm=column,
    )


def _dot(a: Float[Array, "rows d"], b: Float[Array, "rows d"]) -> Array:
    return jnp.sum(a.astype(b.dtype) * b, axis=1, keepdims=True)


def _triangle(columns: Sequence[Array]) -> list[list[Array]]:
    """The columns of a lower triangle, by rows."""
    rows, taken = [], 0
    while taken < len(columns):
        rows.append(list(columns[taken : taken + len(rows) + 1]))
        taken += len(rows)
    return rows


def _combine(weights: Sequence[Array], rows: Iterable[Array]) -> Array:
    terms = [w * row.astype(w.dtype) for w, row in zip(weights, rows, strict=True)]
    return sum(terms[1:], terms[0])


class _Rows(NamedTuple):
    """The rows of both rings, and the products of those of residuals with this one."""

    residuals: Iterable[Array]
    images: Iterable[Array]
    products: Sequence[Array]


def _remember(at: Evaluation, g: Array, memory: Memory, put: Put):
    """The memory with the difference from the last evaluation in it, and its rows."""
    m = len(_triangle(memory.gram))
    dtype = g.dtype
    # Before the second evaluation there is no difference: what is written is not used.
    is_new = at.num_steps > 0
    slot = (at.num_steps + (m - 1)) % m
    scale = jnp.maximum(at.residual, memory.last_norm)
    is_normal = (scale >= jnp.finfo(dtype).tiny) & at.is_finite
    inverse = 1 / jnp.where(is_normal, scale, 1)
    # A row of zeros is not used.
    change = lambda new, old: jnp.where(at.is_finite, new - old, 0) * inverse
    change_g = change(g, memory.last_residual)
    d_residuals, residual_rows = put(memory.d_residuals, slot, change_g)
    d_images, image_rows = put(memory.d_images, slot, change(at.f, memory.last_image))
    # Both products of a row at once, which is then read once.
    products = [(_dot(r, change_g), _dot(r, g)) for r in residual_rows]
    row = [product for product, _ in products]
    gram = _triangle(memory.gram)
    for i in range(m):
        for j in range(i + 1):
            old = jnp.where(slot == j, row[i], gram[i][j])
            gram[i][j] = jnp.where(slot == i, row[j], old)
    num_used = jnp.minimum(memory.num_used + is_new.astype(jnp.int32), m)
    memory = memory._replace(
        d_residuals=d_residuals,
        d_images=d_images,
        gram=tuple(column for columns in gram for column in columns),
        num_used=num_used,
    )
    rows = _Rows(residual_rows, image_rows, [product for _, product in products])
    return memory, rows, slot


def _weights(
    products: Sequence[Array], memory: Memory, slot: Array, knobs: Knobs
) -> list[Array]:
    """Those of the least-squares problem, by normal equations of unit diagonal."""
    gram = _triangle(memory.gram)
    m = len(gram)
    is_used, scales = [], []
    for j in range(m):
        age, length = (slot + (m - j)) % m, gram[j][j]
        used = (age < memory.num_used) & (length > 0)
        is_used.append(used)
        scales.append(jnp.where(used, 1 / jnp.sqrt(jnp.where(used, length, 1)), 0))
    # A row that is not used has a scale of zero, and one on the diagonal.
    for i in range(m):
        for j in range(i + 1):
            gram[i][j] = gram[i][j] * scales[i] * scales[j]
        gram[i][i] = gram[i][i] + jnp.where(is_used[i], knobs.ridge, 1)
    right = [s * product for s, product in zip(scales, products, strict=True)]
    dtype = right[0].dtype
    floor = jnp.asarray(10 * float(jnp.finfo(dtype).eps), dtype)
    solved = solve_written_out(gram, right, floor)
    return [s * x for s, x in zip(scales, solved, strict=True)]


def _is_rejected(at: Evaluation, memory: Memory, knobs: Knobs) -> Bool[Array, "rows 1"]:
    is_small = at.residual <= knobs.safeguard * memory.last_norm
    return at.is_trial & ~(is_small & at.is_finite)


def extrapolated(
    at: Evaluation, knobs: Knobs, memory: Memory, *, put: Put, is_damped: bool
) -> tuple[Array, Array, Memory]:
    """The step; see [`equilax_kernels.affine_fixed_point.rules.advance`][]."""
    g = at.f - at.z
    is_rejected = _is_rejected(at, memory, knobs)
    new, rows, slot = _remember(at, g, memory, put)
    weights = _weights(rows.products, new, slot, knobs)
    biggest = jnp.abs(weights[0])
    for weight in weights[1:]:
        biggest = jnp.maximum(biggest, jnp.abs(weight))
    is_trusted = biggest <= _LARGEST * at.residual
    is_degenerate = ~is_trusted & ~is_rejected & at.is_finite

    # The step starts from here, or from where the one that is taken back did.
    is_base = ~is_rejected & at.is_finite
    base_g = jnp.where(is_base, g, memory.last_residual)
    base_f = jnp.where(is_base, at.f, memory.last_image)
    is_plain = is_rejected | is_degenerate
    plain, moved = base_f, base_f - _combine(weights, rows.images)
    if is_damped:
        plain = plain - knobs.damp * base_g
        moved = moved - knobs.damp * (base_g - _combine(weights, rows.residuals))
    num_used = jnp.where(is_degenerate, 0, new.num_used)
    new = new._replace(
        num_used=num_used,
        last_residual=base_g,
        last_image=base_f,
        last_norm=jnp.where(is_base, at.residual, memory.last_norm),
    )
    is_trial = (~is_plain & (num_used > 0)).astype(jnp.int32)
    return jnp.where(is_plain, plain, moved), is_trial, new
