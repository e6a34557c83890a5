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
from . import extrapolation, rules, support
from .activations import in_kernel
from .rules import Knobs, Settings
from .triton_plan import Plan, plan_of


# Addresses are 32 bits wide.
_MOST_ELEMENTS = 2**31


def unsupported(weight: Any, u: Any, scale: Any, settings: Settings) -> str | None:
    """Why the kernel does not take these, or `None` if it does. Reads no values."""
    del weight, scale
    reason = support.unsupported(u, settings)
    if reason is None and plan_of(u.shape[1], u.dtype, settings) is None:
        reason = f"{u.shape[1]} features do not fit into registers"
    if reason is None and u.size * max(settings.history_length, 1) >= _MOST_ELEMENTS:
        reason = f"{u.size} elements are more than it can address"
    return reason


class Tile(NamedTuple):
    """Where a program reads and writes: masked, since neither axis need fill it."""

    rows: Array
    columns: Array
    num_rows: int
    d: int

    def at(self, ref, slot):
        shape = (self.rows.size, self.columns.size)
        rows = jnp.broadcast_to(self.rows[:, None], shape)
        columns = jnp.broadcast_to(self.columns[None, :], shape)
        mask = (rows < self.num_rows) & (columns < self.d)
        # A ring is as many arrays, one below the other.
        return ref.at[slot * self.num_rows + rows, columns], mask

    def load(self, ref, slot=0):
        at, mask = self.at(ref, slot)
        return plgpu.load(at, mask=mask, other=0)

    def store(self, ref, value, slot=0):
        at, mask = self.at(ref, slot)
        plgpu.store(at, value.astype(ref.dtype), mask=mask)


class _Ring:
    """The rows of a ring in memory: registers hold one at a time.

    A program has its own part of it, near by in the cache.
    """

    def __init__(self, ref, tile: Tile):
        self.ref, self.tile = ref, tile

    def __iter__(self):
        size = self.ref.shape[0] // self.tile.num_rows
        return (self.tile.load(self.ref, j) for j in range(size))


def _put(ring: _Ring, slot, row, *, barrier):
    # Which thread reads an element need not be the one that writes it.
    barrier()
    ring.tile.store(ring.ref, row, slot)
    barrier()
    return ring, ring


def _stepper(ring_refs, tile: Tile, shape, dtype, settings, barrier):
    """The function that takes a step, and the memory it starts with."""
    m = settings.history_length
    if m == 0:
        return rules.damped, ()
    rings = tuple(_Ring(ref, tile) for ref in ring_refs)
    for ring in rings:
        for j in range(m):
            tile.store(ring.ref, jnp.zeros(shape, dtype), j)
    memory = extrapolation.empty(((), ()), m, jnp.zeros(shape, jnp.float32))

    # A loop carries no references.
    def step(at, knobs, memory):
        memory = memory._replace(d_residuals=rings[0], d_images=rings[1])
        z, is_trial, memory = extrapolation.extrapolated(
            at,
            knobs,
            memory,
            put=ft.partial(_put, barrier=barrier),
            is_damped=settings.is_damped,
        )
        return z, is_trial, memory._replace(d_residuals=(), d_images=())

    return step, memory


def _kernel(
    knobs_ref,
    u_ref,
    z0_ref,
    scale_ref,
    weight_ref,
    z_ref,
    *refs,
    num_rows: int,
    settings: Settings,
    plan: Plan,
    is_interpreted: bool,
):
    d = z0_ref.shape[1]
    row_ids = pl.program_id(0) * plan.tile + jnp.arange(plan.tile, dtype=jnp.int32)
    features = jnp.arange(plan.width, dtype=jnp.int32)
    tile = Tile(row_ids, features, num_rows, d)
    knobs = Knobs(*(knobs_ref[i] for i in range(len(Knobs._fields))))
    # An interpreter has neither threads nor a rule for it.
    barrier = (lambda: None) if is_interpreted else plgpu.debug_barrier
    activation = in_kernel(settings.activation)
    weight = weight_ref[...]
    z0, u = tile.load(z0_ref), tile.load(u_ref)
    scale = None if scale_ref is None else tile.load(scale_ref)

    def fn(z):
        precision = settings.precision
        f = rules.image(z, weight, u, scale, activation, precision, jnp.float32)
        # A feature that only fills up the tile stays at zero.
        return jnp.where(features[None, :] < d, f, 0)

    step, memory = _stepper(refs[3:], tile, z0.shape, z0.dtype, settings, barrier)

    def body(carry):
        num_steps, rows, memory = carry
        rows, memory = rules.advance(
            rows, memory, num_steps, fn, step, knobs, settings.max_steps
        )
        return num_steps + 1, rows, memory

    rows = rules.start(z0, (row_ids < num_rows)[:, None], jnp.float32)
    carry = (jnp.int32(0), rows, memory)
    _, rows, _ = lax.while_loop(lambda c: rules.any_live(c[1]), body, carry)
    z, residual = rules.finish(rows)
    tile.store(z_ref, z)
    figures = (rows.num_steps, residual, rows.status)
    for ref, figure in zip(refs[:3], figures, strict=True):
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
    plan: Plan | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    num_rows, d = u.shape
    plan = plan_of(d, u.dtype, settings) if plan is None else plan
    assert plan is not None
    # The weights are small: rather a copy of them than masks on them in registers.
    fill = (0, plan.width - d)
    arrays = (jnp.stack(knobs).astype(jnp.float32), u, z0, scale)
    arrays = (*arrays, jnp.pad(weight, (fill, fill)))
    axes = varying(*jtu.tree_leaves(arrays))
    arrays = jtu.tree_map(lambda x: to_vary(x, axes), arrays)
    column = ft.partial(struct_like, (num_rows,), x=arrays[1])
    m = settings.history_length
    rings = [struct_like((m * num_rows, d), z0.dtype, arrays[1])] * (2 if m > 0 else 0)
    out = pl.pallas_call(
        ft.partial(
            _kernel,
            num_rows=num_rows,
            settings=settings,
            plan=plan,
            is_interpreted=bool(interpret),
        ),
        grid=(pl.cdiv(num_rows, plan.tile),),
        out_shape=[
            struct_like(z0.shape, z0.dtype, arrays[1]),
            *(column(dtype=dtype) for dtype in (jnp.int32, jnp.float32, jnp.int32)),
            *rings,
        ],
        # Without these some versions of JAX take another backend.
        compiler_params=plgpu.CompilerParams(num_warps=plan.num_warps, num_stages=1),
        interpret=interpret,
        name="affine_fixed_point",
    )(*arrays)
    return tuple(out[:4])
