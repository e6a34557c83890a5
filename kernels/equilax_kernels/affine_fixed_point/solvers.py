"""From the arguments of a call to a solve by one implementation."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import tpu, triton
from .activations import Activation
from .folding import fold_batches, without_derivative
from .reference import affine_fixed_point as _reference
from .rules import Knobs, Settings
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
    knobs = (jnp.asarray(x, wide) for x in (rtol, atol, damp, ridge, safeguard))
    is_damped = not (isinstance(damp, (int, float)) and damp == 0)
    settings = Settings(
        activation, max_steps, history_length, is_damped, resolved(precision)
    )
    return (weight, u, z0, scale, Knobs(*knobs)), settings


def _refusal(name: str, weight, u, reason: str) -> ValueError:
    return ValueError(
        f"`implementation={name!r}` does not take `weight` of "
        f"{weight.dtype}{list(weight.shape)} and `u` of {u.dtype}{list(u.shape)}: "
        f"{reason}."
    )


def solver_by(
    name: str, settings: Settings, *, insists: bool = False
) -> Callable[..., RowSolution]:
    """A function of the arrays of [`prepared`][] that solves by one implementation.

    **Arguments:**

    - `insists`: Whether what a kernel does not take is an error, in place of work for
        the reference.
    """
    reference = ft.partial(_reference, settings=settings)
    backend = {"tpu": tpu, "triton": triton}.get(name)

    # Under `vmap` only here the number of rows is known.
    def run(weight, u, z0, scale, knobs):
        if backend is None:
            return reference(weight, u, z0, scale, knobs)
        reason = backend.unsupported(weight, u, scale, settings)
        if reason is None:
            return backend.affine_fixed_point(weight, u, z0, scale, knobs, settings)
        if insists:
            raise _refusal(name, weight, u, reason)
        return reference(weight, u, z0, scale, knobs)

    def run_each(*arrays):
        if insists and backend is not None:
            raise ValueError(
                f"`implementation={name!r}` does not take a batch of `weight` or of "
                "tolerances: under `vmap` only rows may differ."
            )
        return jax.vmap(reference)(*arrays)

    solve = without_derivative(fold_batches(run, run_each), _NO_DERIVATIVE)
    return lambda *arrays: RowSolution(*solve(*arrays))


def able(arrays: tuple, settings: Settings) -> dict[str, Callable[[], RowSolution]]:
    weight, u, _, scale, _ = arrays
    return {
        name: ft.partial(solver_by(name, settings), *arrays)
        for name, backend in (("tpu", tpu), ("triton", triton))
        if backend.unsupported(weight, u, scale, settings) is None
    }
