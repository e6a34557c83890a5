"""Compile kernels for a device that is not there, and say what came of it.

A program of its own, since what it needs to be told stands in the environment, from
before JAX is imported. Run by `test_aot.py`.
"""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import equilax
import equilax_kernels
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from equilax import nn
from equilax.sharding import shard_vmap
from equilax_kernels.affine_fixed_point import specs
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
)


_TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
_H100 = Path(__file__).parent / "h100.txtpb"
_ACTIVATIONS = (jax.nn.softplus, jax.nn.gelu, None, jnp.tanh, jax.nn.relu)


class _LayerCase(NamedTuple):
    """A layer to compile, its batch divided by `shard_vmap` or by the compiler."""

    solver: Any
    linear_solver: Any
    chips: Any
    by_hand: bool


def devices(target: str):
    if target in _TPUS:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=_TPUS[target]
        )
    else:
        topology = topologies.get_topology_desc(
            "", platform="cuda", topology="1x1x4", target_config=_H100.read_text()
        )
    return topology.devices


def lowering(target: str):
    """What has to be around a lowering: some versions of JAX ask a GPU for its name."""
    if target in _TPUS:
        return contextlib.nullcontext()
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _solver(spec: specs.Spec, activation: Any):
    def solve(weight, u, z0, scale, tolerance):
        return tuple(
            equilax_kernels.affine_fixed_point(
                weight,
                u,
                z0,
                activation=activation,
                rtol=tolerance,
                atol=tolerance,
                max_steps=100,
                damp=tolerance,
                scale=scale,
                history_length=spec.history_length,
                precision=spec.precision,
            )
        )

    return solve


def _big_moves(text: str, least: int) -> list[str]:
    """Operations of the program, but for the kernel, that make arrays of this size."""
    entry = text[text.index("\nENTRY") :]
    found = []
    for line in entry.splitlines()[1:]:
        match = re.match(r"\s+(?:ROOT )?%\S+ = (.*?) ([a-z-]+)\(", line)
        if match is None or match[2] in (
            "parameter",
            "custom-call",
            "get-tuple-element",
            "tuple",
            "bitcast",
        ):
            continue
        sizes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", match[1])
        if any(np.prod([int(x) for x in s.split(",")]) >= least for s in sizes):
            found.append(line.strip()[:200])
    return found


def _facts(text: str, spec: specs.Spec) -> dict:
    vmem = re.findall(
        r'tpu_custom_call.*?used_scoped_memory_configs":\[\{"memory_space":"1",'
        r'"offset":"0","size":"(\d+)"',
        text,
    )
    names = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
    return {
        "kernels": re.findall(r'custom_call_target="([^"]+)"', text),
        "loops": text.count(" while("),
        "branches": text.count(" conditional("),
        "collectives": [name for name in names if f" {name}" in text],
        # What is done to the weights is not meant.
        "moves": _big_moves(text, max(spec.rows * spec.d, 4 * spec.d**2 + 257)),
        "vmem": [int(size) for size in vmem],
    }


def _compile(target: str, spec: specs.Spec, activation: Any, chips) -> dict:
    mesh = Mesh(np.array(chips), ("rows",), axis_types=(AxisType.Auto,))
    rows, whole = P("rows") if len(chips) > 1 else P(), P()
    solve = _solver(spec, activation)
    in_specs = (whole, rows, rows, rows, whole)
    if len(chips) > 1:
        solve = jax.shard_map(solve, mesh=mesh, in_specs=in_specs, out_specs=rows)

    # Row-major, as what goes before or after would have it. Left to itself the compiler
    # lays out the arguments and results of a program as it sees fit.
    def layout(shape, spec):
        return Format(Layout(tuple(range(len(shape)))), NamedSharding(mesh, spec))

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout(shape, spec))

    state = struct((spec.rows, spec.d), spec.dtype, rows)
    weight = struct((spec.d, spec.d), spec.dtype, whole)
    scale = state if spec.is_scaled else None
    tolerance = struct((), jnp.float32, whole)
    with lowering(target):
        run = jax.jit(
            solve, out_shardings=(layout(state.shape, rows), None, None, None)
        )
        lowered = run.lower(weight, state, state, scale, tolerance)
    local = spec._replace(rows=spec.rows // len(chips))
    return _facts(str(lowered.compile().as_text()), local)


def _compile_layer(target: str, case: _LayerCase) -> dict:
    """A layer, forward and backward, with its batch split between the chips."""
    chips = case.chips
    mesh = Mesh(np.array(chips), ("rows",), axis_types=(AxisType.Auto,))
    d, num_rows = 64, 2048
    whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("rows"))
    adjoint = equilax.ImplicitAdjoint(case.linear_solver)
    layer = eqx.filter_eval_shape(_layer, d, case.solver, adjoint)
    arrays, static = eqx.partition(layer, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def loss(arrays, xs):
        layer = eqx.combine(arrays, static)
        run = shard_vmap(layer, mesh, "rows") if case.by_hand else jax.vmap(layer)
        return jnp.sum(run(xs) ** 2)

    on = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    xs = jax.ShapeDtypeStruct((num_rows, d), jnp.float32)
    with lowering(target):
        lowered = jax.jit(jax.grad(loss)).lower(
            jax.tree.map(lambda x: on(x, whole), arrays), on(xs, rows)
        )
        # A kernel that is split is lowered while the program is compiled.
        text = str(lowered.compile().as_text())
    return _facts(text, specs.Spec(num_rows // len(chips), d))


def _layer(d: int, solver: Any, adjoint: Any) -> nn.FixedPointLayer:
    cell = nn.AffineCell(d, d, dtype=jnp.float32, key=jr.key(0))
    return nn.FixedPointLayer(cell, solver, adjoint=adjoint)


def _layers(chips) -> list[_LayerCase]:
    picard = equilax.FixedPointIteration(1e-4, 1e-5)
    anderson = equilax.Anderson(1e-4, 1e-5)
    alone = equilax.FixedPointLinearSolver()
    return [
        _LayerCase(picard, equilax.FixedPointLinearSolver(picard), chips[:1], False),
        _LayerCase(anderson, equilax.FallbackLinearSolver(), chips[:1], False),
        _LayerCase(anderson, alone, chips, False),
        _LayerCase(anderson, alone, chips, True),
    ]


def main(target: str) -> None:
    chips = devices(target)
    for case in _layers(chips):
        found: dict = {
            "layer": type(case.solver).__name__,
            "linear_solver": type(case.linear_solver).__name__,
            "num_devices": len(case.chips),
            "by_hand": case.by_hand,
        }
        try:
            found |= _compile_layer(target, case)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:2000]
        print("FOUND", json.dumps(found), flush=True)
    own = specs.COMPILED_FOR_TPU if target in _TPUS else specs.COMPILED_FOR_TRITON
    cases = [(spec, chips[:1]) for spec in specs.COMPILED + own]
    cases.append((specs.COMPILED[0], chips))
    for i, (spec, some) in enumerate(cases):
        activation = _ACTIVATIONS[i % len(_ACTIVATIONS)]
        dtype = jnp.dtype(spec.dtype).name
        found = {
            "spec": spec._replace(dtype=dtype, precision=spec.precision.name)._asdict(),
            "activation": getattr(activation, "__name__", None),
            "num_devices": len(some),
        }
        try:
            found |= _compile(target, spec, activation, some)
        except Exception as error:  # Reported, and the others still compiled.
            found["error"] = f"{type(error).__name__}: {error}"[:2000]
        print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
