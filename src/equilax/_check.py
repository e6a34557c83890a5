"""Errors for wrong calls: the argument, what came, what was expected."""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._custom_types import AxisName, RealScalarLike


def check_instance(name: str, value: Any, kind: type):
    """Refuse what is no instance of `kind`, such as the class in place of one."""
    if not isinstance(value, kind):
        hint = " Did you pass the class?" if isinstance(value, type) else ""
        raise TypeError(
            f"`{name}` must be an instance of `{kind.__name__}`; got {value!r}.{hint}"
        )


def check_callable(name: str, value: Any, form: str):
    """Refuse what cannot be called. `form` shows how it will be."""
    if not callable(value):
        raise TypeError(f"`{name}` must be callable, as `{form}`; got {value!r}.")


def check_integer(name: str, value: Any, least: int):
    """Refuse what is no integer of at least `least`. A truth value is none."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}; got {value!r}."
        )


def check_key(name: str, value: Any):
    """Refuse what is not one PRNG key, new style or old."""
    dtype = getattr(value, "dtype", None)
    is_new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_new and dtype != jnp.uint32:
        raise TypeError(
            f"`{name}` must be a PRNG key, as by `jax.random.key(0)`; got {value!r}."
        )
    shape = value.shape if is_new else value.shape[:-1]
    if shape != () or value.ndim != int(not is_new):
        raise ValueError(
            f"`{name}` must be one PRNG key; got keys of the shape {shape}. Inside "
            "`jax.vmap` there is one for each sample."
        )


def is_readable(value: Any) -> bool:
    """Whether a number is known now, rather than traced or on another machine."""
    if isinstance(value, jax.Array):
        return not isinstance(value, jax.core.Tracer) and value.is_fully_addressable
    return isinstance(value, (int, float, np.number, np.ndarray))


def check_real(name: str, value: Any):
    """Refuse what is not one real number: a truth value, say, or a vector."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and eqx.is_array_like(value):
        is_real = any(jnp.issubdtype(dtype, k) for k in (jnp.floating, jnp.integer))
    if not is_real:
        raise TypeError(f"`{name}` must be a real number; got {value!r}.")
    if np.shape(value) != ():
        raise ValueError(
            f"`{name}` must be one number; got one of shape {np.shape(value)}."
        )


def check_data(**trees: Any):
    """Refuse arrays of NumPy's that hold no numbers, such as text or objects."""
    for name, tree in trees.items():
        for leaf in jtu.tree_leaves(tree):
            is_array = isinstance(leaf, (np.ndarray, np.generic))
            if is_array and leaf.dtype.kind in "OSTUMm":
                raise TypeError(
                    f"`{name}` must hold arrays of numbers or truth values; got one of "
                    f"dtype {leaf.dtype}: {leaf!r}."
                )


def as_static_int(name: str, value: Any) -> Any:
    """What is hashed and compared: no array, and no number of NumPy's."""
    if isinstance(value, np.integer):
        return int(value)
    if hasattr(value, "dtype"):
        raise TypeError(
            f"`{name}` must be a Python integer, known when the program is compiled; "
            f"got {value!r}."
        )
    return value


def check_tolerances(rtol: RealScalarLike, atol: RealScalarLike):
    """Refuse tolerances that are negative or no numbers, where they can be read."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        check_nonnegative(name, value)


def check_axis_name(value: Any):
    """Refuse what does not name mesh axes."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not (names and all(isinstance(n, str) for n in names)):
        raise TypeError(
            "`axis_name` must be the name of a mesh axis, a tuple of names, or `None`; "
            f"got {value!r}."
        )


def check_norm(norm: Any, axis_name: AxisName):
    """Refuse a norm that cannot be told along which mesh axes a state is split."""
    check_callable("norm", norm, "norm(y)")
    if axis_name is None:
        return
    try:
        inspect.signature(norm).bind(None, axis_name)
    except TypeError:
        raise ValueError(
            f"`norm` must be callable as `norm(y, axis_name)` with `axis_name="
            f"{axis_name!r}`, and reduce over these mesh axes; got {norm!r}."
        ) from None


def check_nonnegative(name: str, value: RealScalarLike):
    """Refuse a negative number, where it can be read."""
    check_real(name, value)
    if is_readable(value) and not value >= 0:
        raise ValueError(f"`{name}` must not be negative; got {value}.")


def check_at_least(name: str, value: RealScalarLike, least: float):
    """Refuse a number below `least`, where it can be read."""
    check_real(name, value)
    if is_readable(value) and not value >= least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}.")


def check_fraction(name: str, value: RealScalarLike):
    """Refuse a damping outside [0, 1), where it can be read."""
    check_real(name, value)
    if is_readable(value) and not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1); got {value}.")


def check_positive(name: str, value: RealScalarLike):
    """Refuse what is no positive and finite number, where it can be read."""
    check_real(name, value)
    if is_readable(value) and not 0 < value < np.inf:
        raise ValueError(f"`{name}` must be positive and finite; got {value}.")


def check_number(name: str, value: Any):
    """Refuse what is no number of Python's, for a field that is static."""
    is_number = isinstance(value, (int, float, np.number))
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"`{name}` must be a Python number; got {value!r}.")
