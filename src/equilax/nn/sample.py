"""Errors for a sample that does not fit its cell."""

from typing import Any

from jaxtyping import Array


def check_shape(name: str, value: Array, shape: tuple[int | str, ...]):
    """Refuse another shape. A size that may be any has a name instead."""
    fits = len(value.shape) == len(shape) and all(
        isinstance(size, str) or size == got
        for size, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        inner = ", ".join(map(str, shape)) + "," * (len(shape) == 1)
        raise ValueError(
            f"`{name}` must have the shape ({inner}), one sample without a batch axis; "
            f"got {value.shape}. Use `jax.vmap` for a batch."
        )


def check_dtype(name: str, value: Any, dtype: Any):
    """Refuse a dtype other than that of the parameters."""
    if value.dtype != dtype:
        raise ValueError(
            f"`{name}` must have the dtype of the cell's parameters, {dtype}; got "
            f"{value.dtype}."
        )
