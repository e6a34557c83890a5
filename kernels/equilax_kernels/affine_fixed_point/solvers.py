"""From the arguments of a call to a solve by one implementation."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._lowered import Solve, when_lowered
from . import reference, tpu, triton
from .activations import Activation
from .folding import fold_batches, without_derivative
from .rules import as_knobs, Knobs, Settings
from .support import resolved


class RowSolution(NamedTuple):
    """The solutions of many rows.

    **Attributes:**

    - `value`: The fixed points. Of a row that failed the best iterate, or the last
        finite one.
    - `num_steps`: The updates of each row.
    - `residual`: The maximum norm of $f(z) - z$ at `value`, infinite if not finite.
    - `status`: How each row ended, a `Status`.
    """

    value: Float[Array, "rows d"]
    num_steps: Int[Array, " rows"]
    residual: Float[Array, " rows"]
    status: Int[Array, " rows"]


_NO_DERIVATIVE = (
    "`affine_fixed_point` has no derivative of its own. That of a fixed point is a "
    "linear solve: call it inside a rule that does one, as `equilax.fixed_point` does, "
    "and stop the gradient of what goes in."
)


def _check(weight, u, z0, scale, max_steps: int, history_length: int) -> None:
    shapes = [x.shape for x in (weight, u, z0)] + (
        [] if scale is None else [scale.shape]
    )
    if u.ndim != 2 or weight.shape != (u.shape[1],) * 2 or set(shapes[1:]) != {u.shape}:
        raise ValueError(
            "`weight` must have the shape (d, d), and `u`, `z0` and `scale` (rows, d); "
            f"got {', '.join(map(str, shapes))}."
        )
    dtypes = {str(x.dtype) for x in (weight, u, z0)} | (
        set() if scale is None else {str(scale.dtype)}
    )
    if len(dtypes) > 1 or not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(
            "`weight`, `u`, `z0` and `scale` must have one real floating-point dtype; "
            f"got {', '.join(sorted(dtypes))}."
        )
    if max_steps < 0 or history_length < 0:
        raise ValueError(
            "`max_steps` and `history_length` must not be negative; got "
            f"{max_steps} and {history_length}."
        )


def prepared(
    weight,
    u,
    z0,
    *,
    activation: Activation,
    rtol: Any,
    atol: Any,
    max_steps: int,
    damp: Any = 0.0,
    scale=None,
    history_length: int = 0,
    ridge: Any = 1e-10,
    safeguard: Any = 2.0,
    precision: lax.Precision | None = None,
) -> tuple[tuple, Settings]:
    """What a solve needs: arrays, and what is known before."""
    weight, u, z0 = map(jnp.asarray, (weight, u, z0))
    scale = None if scale is None else jnp.asarray(scale)
    _check(weight, u, z0, scale, max_steps, history_length)
    wide = u.dtype if jnp.finfo(u.dtype).bits > 32 else jnp.dtype(jnp.float32)
    knobs = as_knobs(wide, rtol, atol, damp, ridge, safeguard)
    is_damped = not (isinstance(damp, (int, float)) and damp == 0)
    settings = Settings(
        activation, max_steps, history_length, is_damped, resolved(precision)
    )
    return (weight, u, z0, scale, knobs), settings


def _refusal(name: str, weight, u, reason: str) -> ValueError:
    return ValueError(
        f"`implementation={name!r}` does not take `weight` of "
        f"{weight.dtype}{list(weight.shape)} and `u` of {u.dtype}{list(u.shape)}: "
        f"{reason}."
    )


_NO_ROWS = (False,) * len(Knobs._fields)
_BACKENDS: dict[str, Any] = {"reference": reference, "tpu": tpu, "triton": triton}


class _By(NamedTuple):
    """A solve of arrays by one implementation: equal to any other such."""

    name: str
    settings: Settings

    def __call__(self, *arrays):
        backend = _BACKENDS[self.name]
        return backend.affine_fixed_point(*arrays, settings=self.settings)


def _out(weight, u, z0, scale, knobs) -> tuple[jax.ShapeDtypeStruct, ...]:
    del weight, u, scale, knobs
    figure = ft.partial(jax.ShapeDtypeStruct, z0.shape[:1])
    value = jax.ShapeDtypeStruct(z0.shape, z0.dtype)
    return value, figure(jnp.int32), figure(jnp.float32), figure(jnp.int32)


def solver_by(
    name: str,
    settings: Settings,
    *,
    otherwise: Solve | None = None,
    insists: bool = False,
) -> Callable[..., RowSolution]:
    """A function of the arrays of [`prepared`][] that solves by one implementation.

    **Arguments:**

    - `otherwise`: What does the work that a kernel does not take. Defaults to the
        reference.
    - `insists`: Whether that is an error instead.
    """
    otherwise = _By("reference", settings) if otherwise is None else otherwise
    backend = None if name == "reference" else _BACKENDS[name]

    # Under `vmap` only here the number of rows is known.
    def run(weight, u, z0, scale, knobs):
        if backend is None:
            return otherwise(weight, u, z0, scale, knobs)
        reason = backend.unsupported(weight, u, scale, settings)
        if reason is None:
            args = (weight, u, z0, scale, knobs)
            is_row = (False, True, True, *(scale is not None) * (True,), *_NO_ROWS)
            is_row = is_row if name == "triton" else None
            return when_lowered(_By(name, settings), otherwise, args, is_row, _out)
        if insists:
            raise _refusal(name, weight, u, reason)
        return otherwise(weight, u, z0, scale, knobs)

    def run_each(*arrays):
        if insists and backend is not None:
            raise ValueError(
                f"`implementation={name!r}` does not take a batch of `weight` or of "
                "tolerances: under `vmap` only rows may differ."
            )
        return jax.vmap(otherwise)(*arrays)

    solve = without_derivative(fold_batches(run, run_each), _NO_DERIVATIVE)
    return lambda *arrays: RowSolution(*solve(*arrays))


def able(
    arrays: tuple, settings: Settings, otherwise: Solve | None = None
) -> dict[str, Callable[[], RowSolution]]:
    """By implementation, a solve of `arrays` by it, if it takes them."""
    weight, u, _, scale, _ = arrays
    return {
        name: ft.partial(solver_by(name, settings, otherwise=otherwise), *arrays)
        for name, backend in (("tpu", tpu), ("triton", triton))
        if backend.unsupported(weight, u, scale, settings) is None
    }
