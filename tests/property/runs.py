"""Batches of solves and their derivatives, one compiled program a structure."""

import dataclasses
import functools as ft
from typing import Any

import equilax as eqlx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.sharding import AxisType, PartitionSpec as P

from ..helpers import every_solver
from .maps import Kind


BATCH = 4
SOLVERS = (*every_solver(0.0, 0.0), "aitken", "squarem", "up_to")
BATCHINGS = {
    "staged": eqlx.Staged(factor=2, min_size=1),
    "lockstep": eqlx.Lockstep(),
    "vmapped": eqlx.Vmapped(),
}
NEUMANN_TERMS = 3
UP_TO = 40
ADJOINTS = {
    "default": eqlx.ImplicitAdjoint(),
    "fixed_point": eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver()),
    "krylov": eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver()),
    "neumann": eqlx.ImplicitAdjoint(eqlx.Neumann(NEUMANN_TERMS)),
    "lu": eqlx.ImplicitAdjoint(lx.LU()),
    "shared_inverse": eqlx.SharedInverseAdjoint(eqlx.KrylovLinearSolver()),
}
NESTS = (
    "vmap_of_grad",
    "grad_of_vmap",
    "vmap_of_vmap",
    "vmap_of_jit",
    "map",
    "checkpoint",
    "shard_map",
    "shard_vmap",
)


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a program is compiled for."""

    kind: Kind
    solver: str = "anderson"
    adjoint: str = "default"
    batching: str = "staged"
    nest: str = "vmap_of_grad"
    max_steps: int = 256


def structure(row: dict[str, Any]) -> Structure:
    """From a choice of all the fields, where some combinations do not exist."""
    row = dict(row)
    kind = Kind(row.pop("form"), row.pop("dtype"), row.pop("size"))
    is_direct = row.get("adjoint") == "lu"
    if is_direct and (kind.eps > 1e-4 or "shard" in row.get("nest", "")):
        row["adjoint"] = "krylov"
    if row.get("adjoint") == "shared_inverse" and "broyden" not in row["solver"]:
        row["solver"] = "broyden" if kind.size % 2 else "bad_broyden"
    return Structure(kind, **row)


def make_solver(name: str, rtol, atol) -> eqlx.AbstractFixedPointSolver:
    others = {
        "aitken": eqlx.Aitken(rtol, atol),
        "squarem": eqlx.Squarem(rtol, atol),
        "up_to": eqlx.UpTo(eqlx.Anderson(rtol, atol), UP_TO),
    }
    return (every_solver(rtol, atol) | others)[name]


def _solve(s: Structure, args, y0, rtol, atol) -> eqlx.Solution:
    return eqlx.fixed_point(
        s.kind.fn,
        make_solver(s.solver, rtol, atol),
        s.kind.state(y0),
        args,
        max_steps=s.max_steps,
        adjoint=ADJOINTS[s.adjoint],
        batching=BATCHINGS[s.batching],
        throw=False,
    )


RESULT_NAMES = (
    "successful",
    "max_steps_reached",
    "nonfinite",
    "divergence",
    "stagnation",
)


def _outputs(s: Structure, sol: eqlx.Solution) -> dict[str, Any]:
    results = [getattr(eqlx.RESULTS, name) for name in RESULT_NAMES]
    is_one = jnp.stack([sol.result == result for result in results])
    return {
        "value": s.kind.flat(sol.value),
        "result": jnp.where(jnp.any(is_one), jnp.argmax(is_one), -1),
        "residual": sol.stats["residual"],
        "num_steps": sol.stats["num_steps"],
    }


def _loss(s: Structure, inexact, places, ct, rtol, atol):
    weights, x, y0 = inexact
    sol = _solve(s, (weights, places, x), y0, rtol, atol)
    value = s.kind.flat(sol.value)
    loss = jnp.sum(value.real * ct.real)
    if s.kind.is_complex:
        loss = loss + jnp.sum(value.imag * ct.imag)
    return loss, _outputs(s, sol)


def _halved(tree):
    return jax.tree.map(lambda a: a.reshape(2, len(a) // 2, *a.shape[1:]), tree)


@ft.cache
def compiled(s: Structure):
    """A function of batches of `(weights, x, y0), places, ct, rtol, atol`."""
    loss = ft.partial(_loss, s)
    if s.nest == "checkpoint":
        loss = jax.checkpoint(loss)

    one = jax.grad(loss, has_aux=True)

    def total(inexact, *rest):
        losses, out = jax.vmap(loss)(inexact, *rest)
        return jnp.sum(losses), out

    if s.nest == "grad_of_vmap":
        return jax.jit(jax.grad(total, has_aux=True))
    if s.nest == "vmap_of_jit":
        return jax.vmap(jax.jit(one))
    if s.nest == "map":
        return jax.jit(lambda *batch: jax.lax.map(lambda b: one(*b), batch))
    if s.nest == "vmap_of_vmap":
        twice = jax.vmap(jax.vmap(one))
        split = lambda *batch: twice(*_halved(batch))
        return jax.jit(lambda *batch: _joined(split(*batch)))
    mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))
    if s.nest == "shard_vmap":
        return jax.jit(eqlx.sharding.shard_vmap(one, mesh, "b"))
    if s.nest == "shard_map":
        local = jax.vmap(one)
        return jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=P("b"), out_specs=P("b"))
        )
    return jax.jit(jax.vmap(one))


@ft.cache
def lone(s: Structure):
    """As `compiled`, of a sample by itself."""
    return jax.jit(jax.grad(ft.partial(_loss, s), has_aux=True))


def _joined(tree):
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree
    )


@ft.cache
def forward(s: Structure):
    """As `compiled`, but for tangents of `weights` and `x` in place of a cotangent."""

    def one(weights, x, y0, places, tangents, rtol, atol):
        def value(weights, x):
            out = _outputs(s, _solve(s, (weights, places, x), y0, rtol, atol))
            return out.pop("value"), out

        value, tangent, out = jax.jvp(value, (weights, x), tangents, has_aux=True)
        return tangent, {"value": value, **out}

    return jax.jit(jax.vmap(one))
