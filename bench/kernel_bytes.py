"""What XLA makes of the steps that a kernel could take over, in bytes and launches.

Compiled for an H100 and for a TPU v5e without either. A unit is one state of the batch;
an operation reads its operands and writes its result once.
"""

import argparse
import functools as ft
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from equilax_kernels.affine_fixed_point import extrapolation, reference, rules
from jax import lax
from jax.sharding import SingleDeviceSharding
from tests.kernels import aot, test_aot


_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while")
_LINE = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z-]*)\((.*)")


def _sizes(shape: str) -> list[int]:
    """The bytes of each array in the text of a type."""
    found = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", shape)
    return [
        int(bits) // 8 * int(np.prod([int(x) for x in dims.split(",") if x] or [1]))
        for _, bits, dims in found
    ]


def count(text: str, unit: int) -> tuple[float, int]:
    """Units moved and operations run in a program, or in its loop if it has one."""
    body = re.search(r"body=%(\S+?)[,\s]", text)
    head = rf"\n%{re.escape(body[1])} " if body else r"\nENTRY "
    block = re.split(head, text)[1].split("\n}")[0]
    lines = [match for match in map(_LINE.match, block.splitlines()) if match]
    results = {name: _sizes(shape) for name, shape, _, _ in (m.groups() for m in lines)}
    moved, operations = 0.0, 0
    for name, _, kind, rest in (m.groups() for m in lines):
        if kind in _FREE or kind.endswith(("-start", "-done")):
            continue
        operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
        arrays = [s for key in (name, *operands) for s in results.get(key, [])]
        arrays = [size for size in arrays if 2 * size >= unit]
        if "dynamic_update_slice" in name or "dynamic-update-slice" in name:
            # In place: a row of the ring is written, and the rest of it left alone.
            ring = max(arrays)
            arrays = [size for size in arrays if size != ring] + [unit]
        moved += sum(arrays)
        operations += 1
    return moved / unit, operations


def _programs(rows: int, d: int, m: int) -> dict:
    """Name: the function, the shapes it takes, and the units that a kernel would move.

    Each is the reference that a kernel would be checked against.
    """
    state, column, ring = (rows, d), (rows, 1), (m, rows, d)
    knobs = rules.Knobs(*map(jnp.float32, (1e-5, 1e-5, 0.0, 1e-10, 2.0)))
    settings = rules.Settings(jnp.tanh, 100, 0, False, lax.Precision.DEFAULT)
    whole = ft.partial(reference.affine_fixed_point, scale=None, knobs=knobs)

    def masked_step(z, f, best, status, first, best_residual):
        zero = jnp.zeros(status.shape, jnp.int32)
        status = status.astype(jnp.int32)
        at = rules.Rows(z, best, status, zero, first, first, best_residual, zero, zero)
        out, _ = rules.advance(
            at, (), jnp.int32(3), lambda z: f, rules.damped, knobs, 100
        )
        return out

    def anderson_mix(z, f, d_residuals, d_images, *gram):
        wide = extrapolation.empty((d_residuals, d_images), m, z)
        memory = wide._replace(gram=gram, num_used=wide.num_used + m)
        residual = rules.largest(jnp.abs(f - z))
        true = residual > 0
        at = rules.Evaluation(z, f, residual, true, true, jnp.int32(7))
        put = lambda ring, slot, row: (ring, list(ring))
        out = extrapolation.extrapolated(at, knobs, memory, put=put, is_damped=False)
        return out[0], out[2].gram

    def lowrank_mv(v, left, right):
        weights = jnp.einsum("mrd,rd->mr", right, v, precision="highest")
        return v + jnp.einsum("mr,mrd->rd", weights, left, precision="highest")

    triangle = (column,) * extrapolation.gram_size(m)
    solve = lambda w, u, z0: whole(w, u, z0, settings=settings)
    longer = settings._replace(history_length=m)
    accelerated = lambda w, u, z0: whole(w, u, z0, settings=longer)
    return {
        "a step of the loop": (solve, ((d, d), state, state), 0),
        "masked_step": (masked_step, (state,) * 3 + (column,) * 3, 5),
        "anderson_mix": (
            anderson_mix,
            (state, state, ring, ring, *triangle),
            2 * m + 3,
        ),
        "lowrank_mv": (lowrank_mv, (state, ring, ring), 2 * m + 2),
        "a step of Anderson's loop": (accelerated, ((d, d), state, state), 0),
    }


def measure(target: str, rows: int, d: int, m: int) -> None:
    sharding = SingleDeviceSharding(aot.devices(target)[0])
    for name, (fn, shapes, least) in _programs(rows, d, m).items():
        arrays = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for shape in shapes
        ]
        with aot.lowering(target):
            text = str(jax.jit(fn).lower(*arrays).compile().as_text())
        units, operations = count(text, 4 * rows * d)
        print("FOUND", json.dumps([target, name, units, operations, least]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=["h100", "v5e"])
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--history", type=int, default=5)
    options = parser.parse_args()
    if options.target:
        measure(options.target, options.rows, options.features, options.history)
        return
    print("| | on | units by XLA | operations | units by a kernel |")
    print("|---|---|---|---|---|")
    for target in ("h100", "v5e"):
        done = subprocess.run(
            [sys.executable, "-m", "bench.kernel_bytes", *sys.argv[1:]]
            + ["--target", target],
            env=os.environ | test_aot.environment(target),
            capture_output=True,
            text=True,
            check=True,
        )
        for line in done.stdout.splitlines():
            if line.startswith("FOUND "):
                target, name, units, operations, least = json.loads(line[6:])
                print(f"| {name} | {target} | {units:.1f} | {operations} | {least} |")


if __name__ == "__main__":
    main()
