"""Pallas Triton: a tile of rows from its first to its last step in registers."""

import functools as ft
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from .._mesh import struct_like, to_vary, varying
from . import extrapolation, rules
from .activations import in_kernel, is_known
from .rules import Knobs, Settings


class Plan(NamedTuple):
    """How a tile is worked on.

    A `chunk` is the number of features of the weights that are on chip at a time: all
    of them for as long as the kernel runs, or one part after the other in every step.
    """

    tile: int
    num_warps: int
    chunk: int


def _put(ring, slot, row):
    rows = [
        jnp.where(slot == j, row.astype(old.dtype), old) for j, old in enumerate(ring)
    ]
    return tuple(rows), rows


class _Tile(NamedTuple):
    """Where a program reads and writes: masked, since neither axis need fill it."""

    rows: Array
    columns: Array
    num_rows: int
    d: int

    def _at(self, ref):
        shape = (self.rows.size, self.columns.size)
        rows = jnp.broadcast_to(self.rows[:, None], shape)
        columns = jnp.broadcast_to(self.columns[None, :], shape)
        mask = (rows < self.num_rows) & (columns < self.d)
        return ref.at[rows, columns], mask

    def load(self, ref):
        at, mask = self._at(ref)
        return plgpu.load(at, mask=mask, other=0)

    def store(self, ref, value):
        at, mask = self._at(ref)
        plgpu.store(at, value, mask=mask)


def _multiplier(z_ref, weight_ref, tile: _Tile, plan: Plan, settings, is_interpreted):
    """The function that multiplies iterates by the weights."""
    width = tile.columns.size
    dot = ft.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=settings.precision,
        preferred_element_type=jnp.float32,
    )
    features = jnp.arange(width, dtype=jnp.int32)
    if plan.chunk >= width:
        weight = _Tile(features, features, tile.d, tile.d).load(weight_ref)
        return lambda z: dot(z, weight)

    barrier = (lambda: None) if is_interpreted else plgpu.debug_barrier

    def streamed(z):
        # Through memory, since the parts of an array in registers cannot be told
        # apart. A program reads what it wrote itself, once all of its threads have.
        barrier()
        tile.store(z_ref, z)
        barrier()

        def add(i, total):
            part = i * plan.chunk + jnp.arange(plan.chunk, dtype=jnp.int32)
            z_part = tile._replace(columns=part).load(z_ref)
            weight = _Tile(features, part, tile.d, tile.d).load(weight_ref)
            return total + dot(z_part, weight)

        zero = jnp.zeros((tile.rows.size, width), jnp.float32)
        return lax.fori_loop(0, width // plan.chunk, add, zero)

    return streamed


def _kernel(
    knobs_ref, u_ref, z0_ref, scale_ref, weight_ref, z_ref, *figure_refs,
    num_rows: int, settings: Settings, plan: Plan, is_interpreted: bool,
):
    d = z0_ref.shape[1]
    first = pl.program_id(0) * plan.tile
    row_ids = first + jnp.arange(plan.tile, dtype=jnp.int32)
    features = jnp.arange(pl.next_power_of_2(d), dtype=jnp.int32)
    tile = _Tile(row_ids, features, num_rows, d)
    knobs = Knobs(*(knobs_ref[i] for i in range(len(Knobs._fields))))
    activation = in_kernel(settings.activation)
    multiply = _multiplier(z_ref, weight_ref, tile, plan, settings, is_interpreted)
    u = tile.load(u_ref).astype(jnp.float32)
    scale = None if scale_ref is None else tile.load(scale_ref).astype(jnp.float32)
    z0 = tile.load(z0_ref)

    def image(z):
        if scale is not None:
            z = (z.astype(jnp.float32) * scale).astype(z.dtype)
        f = activation(multiply(z) + u)
        # A feature that only fills up the tile stays where it starts.
        f = jnp.where(features[None, :] < d, f, 0)
        return f.astype(z.dtype).astype(jnp.float32)

    m = settings.history_length
    step, memory = rules.damped, ()
    if m > 0:
        step = ft.partial(
            extrapolation.extrapolated, put=_put, is_damped=settings.is_damped
        )
        ring = (jnp.zeros(z0.shape, z0.dtype),) * m
        like = jnp.zeros(z0.shape, jnp.float32)
        memory = extrapolation.empty((ring, ring), m, like)

    def body(carry):
        num_steps, rows, memory = carry
        rows, memory = rules.advance(
            rows, memory, num_steps, image, step, knobs, settings.max_steps
        )
        return num_steps + 1, rows, memory

    rows = rules.start(z0, (row_ids < num_rows)[:, None], jnp.float32)
    carry = (jnp.int32(0), rows, memory)
    _, rows, _ = lax.while_loop(lambda c: rules.any_live(c[1]), body, carry)
    z, residual = rules.finish(rows)
    tile.store(z_ref, z)
    figures = (rows.num_steps, residual, rows.status)
    for ref, figure in zip(figure_refs, figures, strict=True):
        figure = jnp.reshape(figure, row_ids.shape)
        plgpu.store(ref.at[row_ids], figure, mask=row_ids < num_rows)


def affine_fixed_point(
    weight: Float[Array, "d d"],
    u: Float[Array, "rows d"],
    z0: Float[Array, "rows d"],
    scale: Float[Array, "rows d"] | None,
    knobs: Knobs,
    settings: Settings,
    *,
    plan: Plan,
    interpret: Any = False,
) -> tuple[Array, Array, Array, Array]:
    num_rows = u.shape[0]
    arrays = (jnp.stack(knobs).astype(jnp.float32), u, z0, scale, weight)
    axes = varying(*jtu.tree_leaves(arrays))
    arrays = jtu.tree_map(lambda x: to_vary(x, axes), arrays)
    like = arrays[1]
    return tuple(
        pl.pallas_call(
            ft.partial(
                _kernel,
                num_rows=num_rows,
                settings=settings,
                plan=plan,
                is_interpreted=bool(interpret),
            ),
            grid=(pl.cdiv(num_rows, plan.tile),),
            out_shape=[
                struct_like(z0.shape, z0.dtype, like),
                struct_like((num_rows,), jnp.int32, like),
                struct_like((num_rows,), jnp.float32, like),
                struct_like((num_rows,), jnp.int32, like),
            ],
            # Without these some versions of JAX take another backend.
            compiler_params=plgpu.CompilerParams(
                num_warps=plan.num_warps, num_stages=1
            ),
            interpret=interpret,
            name="affine_fixed_point",
        )(*arrays)
    )
