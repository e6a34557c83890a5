"""Pallas Mosaic: a tile of rows from its first to its last step in VMEM."""

import functools as ft
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .._mesh import struct_like, to_vary, varying
from . import extrapolation, rules, support
from .activations import in_kernel
from .extrapolation import Memory
from .rules import Knobs, Rows, Settings
from .tpu_plan import LANES, SUBLANES, tile_of, VMEM_BYTES, vmem_bytes


def unsupported(weight: Any, u: Any, scale: Any, settings: Settings) -> str | None:
    """Why the kernel does not take these, or `None` if it does. Reads no values."""
    del weight
    reason = support.unsupported(u, settings)
    if reason is not None:
        return reason
    num_rows, d = u.shape
    # Mosaic multiplies by a column of one in the dtype of the factors, and then has no
    # way to the wider one of the sum (JAX 0.10.2).
    if d == 1 and u.dtype == jnp.bfloat16:
        return "there is one feature of bfloat16, whose product Mosaic does not widen"
    needed = vmem_bytes(
        num_rows,
        d,
        u.dtype,
        is_scaled=scale is not None,
        history_length=settings.history_length,
    )
    if needed > VMEM_BYTES:
        return f"a tile needs {needed} bytes of VMEM, more than {VMEM_BYTES}"
    return None


class _Scratch(NamedTuple):
    rows: Rows
    memory: Any


def _scratch(z0: Any, tile: int, m: int) -> Any:
    """A `_Scratch` of what to allocate."""
    d = z0.shape[1]
    vmem: Any = pltpu.VMEM
    block, wide = vmem((tile, d), z0.dtype), vmem((tile, d), jnp.float32)
    real, whole = (vmem((tile, 1), dtype) for dtype in (jnp.float32, jnp.int32))
    rows = Rows(block, block, whole, whole, real, real, real, whole, whole)
    if m == 0:
        return _Scratch(rows, ())
    ring = vmem((m, tile, d), z0.dtype)
    gram = (real,) * extrapolation.gram_size(m)
    return _Scratch(rows, Memory(ring, ring, gram, whole, wide, wide, real))


def _put(ring, slot, row):
    ring[slot] = row.astype(ring.dtype)
    return ring, [ring[j] for j in range(ring.shape[0])]


# A loop of Mosaic carries scalars alone, so that the state of a tile is in references.
def _read(refs):
    return jtu.tree_map(lambda ref: ref[...], refs)


def _write(refs, values):
    def write(ref, value):
        ref[...] = value

    jtu.tree_map(write, refs, values)


def _read_memory(refs):
    if not refs:
        return ()
    rings = {"d_residuals": refs.d_residuals, "d_images": refs.d_images}
    return _read(refs._replace(d_residuals=(), d_images=()))._replace(**rings)


def _write_memory(refs, memory):
    if refs:
        without = {"d_residuals": (), "d_images": ()}
        _write(refs._replace(**without), memory._replace(**without))


def _solve_tile(u_ref, scale_ref, weight_ref, scratch, knobs, settings):
    activation = in_kernel(settings.activation)
    # Of factors in bfloat16 the products are exact anyway, and Mosaic takes no other.
    is_single = weight_ref.dtype == jnp.float32
    precision = settings.precision if is_single else lax.Precision.DEFAULT

    def fn(z):
        scale = None if scale_ref is None else scale_ref[...]
        weight, u = weight_ref[...], u_ref[...]
        return rules.image(z, weight, u, scale, activation, precision, jnp.float32)

    step = rules.damped
    if settings.history_length > 0:
        step = ft.partial(
            extrapolation.extrapolated, put=_put, is_damped=settings.is_damped
        )

    def body(carry):
        num_steps, _ = carry
        rows, memory = rules.advance(
            _read(scratch.rows),
            _read_memory(scratch.memory),
            num_steps,
            fn,
            step,
            knobs,
            settings.max_steps,
        )
        _write(scratch.rows, rows)
        _write_memory(scratch.memory, memory)
        return num_steps + 1, jnp.min(rows.status)

    lax.while_loop(lambda c: c[1] < 0, body, (jnp.int32(0), jnp.int32(-1)))


def _kernel(
    knobs_ref,
    u_ref,
    z0_ref,
    scale_ref,
    weight_ref,
    z_ref,
    stats_ref,
    scratch,
    *,
    num_rows: int,
    settings: Settings,
):
    tile, d = z0_ref.shape
    knobs = Knobs(*(knobs_ref[i] for i in range(len(Knobs._fields))))
    first = pl.program_id(0) * tile
    is_row = first + lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < num_rows
    _write(scratch.rows, rules.start(z0_ref[...], is_row, jnp.float32))
    if scratch.memory:
        ring = scratch.memory.d_residuals
        for j in range(settings.history_length):
            ring[j] = jnp.zeros((tile, d), ring.dtype)
            scratch.memory.d_images[j] = jnp.zeros((tile, d), ring.dtype)
        like = jnp.zeros((tile, d), jnp.float32)
        empty = extrapolation.empty(((), ()), settings.history_length, like)
        _write_memory(scratch.memory, empty)
    _solve_tile(u_ref, scale_ref, weight_ref, scratch, knobs, settings)
    rows = _read(scratch.rows)
    z, residual = rules.finish(rows)
    z_ref[...] = z
    # One row of the output a figure: a column would be as large as the state in HBM.
    lane = lax.broadcasted_iota(jnp.int32, (tile, LANES), 1)
    bits = lax.bitcast_convert_type(residual, jnp.int32)
    figures = jnp.where(
        lane == 0, bits, jnp.where(lane == 1, rows.num_steps, rows.status)
    )
    stats_ref[...] = jnp.transpose(figures)[:SUBLANES]


def affine_fixed_point(
    weight: Float[Array, "d d"],
    u: Float[Array, "rows d"],
    z0: Float[Array, "rows d"],
    scale: Float[Array, "rows d"] | None,
    knobs: Knobs,
    settings: Settings,
    *,
    tile: int | None = None,
    interpret: Any = False,
) -> tuple[Array, Array, Array, Array]:
    num_rows, d = u.shape
    tile = tile_of(num_rows) if tile is None else tile
    num_tiles = pl.cdiv(num_rows, tile)
    arrays = (jnp.stack(knobs).astype(jnp.float32), u, z0, scale, weight)
    axes = varying(*jtu.tree_leaves(arrays))
    arrays = jtu.tree_map(lambda x: to_vary(x, axes), arrays)
    # A zero of Python's is 64 bits wide where the user has asked for that.
    scalars = pl.BlockSpec(
        (len(knobs),), lambda i: (jnp.int32(0),), memory_space=pltpu.SMEM
    )
    rows = pl.BlockSpec((tile, d), lambda i: (i, jnp.int32(0)))
    whole = pl.BlockSpec((d, d), lambda i: (jnp.int32(0), jnp.int32(0)))
    z, stats = pl.pallas_call(
        ft.partial(_kernel, num_rows=num_rows, settings=settings),
        grid=(num_tiles,),
        in_specs=[
            scalars,
            rows,
            rows,
            None if scale is None else rows,
            whole,
        ],
        out_specs=[rows, pl.BlockSpec((SUBLANES, tile), lambda i: (jnp.int32(0), i))],
        out_shape=[
            struct_like(z0.shape, z0.dtype, arrays[1]),
            struct_like((SUBLANES, num_tiles * tile), jnp.int32, arrays[1]),
        ],
        scratch_shapes=[_scratch(z0, tile, settings.history_length)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="affine_fixed_point",
    )(*arrays)
    residual, num_steps, status = stats[:3, :num_rows]
    return z, num_steps, lax.bitcast_convert_type(residual, jnp.float32), status
