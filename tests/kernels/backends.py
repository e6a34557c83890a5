"""`affine_fixed_point` by each of its backends, where no device is at hand."""

from typing import Any

import jax
import jax.numpy as jnp
from equilax_kernels.affine_fixed_point import reference, RowSolution, tpu, triton
from equilax_kernels.affine_fixed_point.rules import as_knobs, Settings
from equilax_kernels.affine_fixed_point.triton_plan import Plan
from jax import lax
from jax.experimental.pallas import tpu as pltpu


# Small tiles, so that few rows make several of them.
_TPU_TILE = 8
_TRITON_TILE = 4

# What is not written is not a number there, and two that meet in memory are reported.
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def _reference(settings, *arrays):
    return reference.affine_fixed_point(*arrays, settings=settings)


def _tpu(settings, *arrays, interpret: Any = True):
    return tpu.affine_fixed_point(
        *arrays, settings=settings, tile=_TPU_TILE, interpret=interpret
    )


def _tpu_strict(settings, *arrays):
    return _tpu(settings, *arrays, interpret=STRICT)


def _triton(settings, *arrays):
    width = 1 << (arrays[1].shape[1] - 1).bit_length()
    plan = Plan(_TRITON_TILE, 4, width)
    return triton.affine_fixed_point(
        *arrays, settings=settings, plan=plan, interpret=True
    )


BACKENDS = {
    "reference": _reference,
    "tpu": _tpu,
    "tpu_strict": _tpu_strict,
    "triton": _triton,
}


def solve_on(
    backend: str,
    weight,
    u,
    z0=None,
    *,
    activation=jnp.tanh,
    rtol=1e-5,
    atol=1e-5,
    max_steps=200,
    damp=0.0,
    scale=None,
    history_length=0,
    dtype: Any = jnp.float32,
) -> RowSolution:
    """The solution by `backend`."""
    weight, u = jnp.asarray(weight, dtype), jnp.asarray(u, dtype)
    scale = None if scale is None else jnp.asarray(scale, dtype)
    z0 = jnp.zeros_like(u) if z0 is None else jnp.asarray(z0, dtype)
    knobs = as_knobs(jnp.float32, rtol, atol, damp, 1e-10, 2.0)
    settings = Settings(
        activation, max_steps, history_length, damp != 0, lax.Precision.HIGHEST
    )
    solve = jax.jit(lambda *arrays: BACKENDS[backend](settings, *arrays))
    return RowSolution(*solve(weight, u, z0, scale, knobs))


def run(*args, **options) -> RowSolution:
    """The same as numpy arrays, which no transformation sees."""
    return jax.device_get(solve_on(*args, **options))
