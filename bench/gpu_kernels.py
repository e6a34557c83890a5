"""Kernels on a GPU: right, how fast, and how near to what the card can do."""

import functools as ft
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from equilax import nn
from equilax_kernels import affine_fixed_point
from equilax_kernels.affine_fixed_point import triton
from equilax_kernels.affine_fixed_point.rules import Knobs, Settings
from equilax_kernels.affine_fixed_point.triton_plan import Plan, plan_of
from jax import lax


TOLERANCE = 1e-4
_HIGHEST = lax.Precision.HIGHEST


def _milliseconds(cases: dict[str, Callable[[], Any]], repeats: int = 15) -> dict:
    """Medians, the cases taking turns; `None` for what does not run, with its error."""
    alive: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    for name, run in cases.items():
        try:
            jax.block_until_ready(run())
            alive[name] = run
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(repeats):
        for name, run in alive.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
    return found | {name: statistics.median(t) for name, t in times.items()}


def _problem(rows: int, d: int, dtype: Any, gain: float = 0.8, slow: int = 0):
    """Weights of norm `gain`, and rows of which the last `slow` take far longer."""
    w_key, u_key = jr.split(jr.key(0))
    weight = jr.normal(w_key, (d, d), jnp.float32)
    weight = gain * weight / jnp.linalg.norm(weight, 2)
    # What saturates is quick: its slope is small.
    size = jnp.where(jnp.arange(rows) < rows - slow, 4.0, 0.3)
    u = size[:, None] * jr.normal(u_key, (rows, d), jnp.float32)
    return weight.astype(dtype), u.astype(dtype)


def _options(m: int) -> dict[str, Any]:
    return {
        "activation": jnp.tanh,
        "rtol": 0.0,
        "atol": TOLERANCE,
        "max_steps": 300,
        "history_length": m,
    }


def correctness(small: bool) -> Iterator[dict]:
    """Values against an iteration in float64, and statuses, on random data."""
    for d in (1, 20, 32, 50, 64, 100, 128):
        for m, dtype in ((0, jnp.float32), (5, jnp.float32), (0, jnp.bfloat16)):
            rows = 37 if small else 1001
            weight, u = _problem(rows, d, dtype)
            precision = _HIGHEST if dtype == jnp.float32 else None
            out = affine_fixed_point(
                weight, u, 0 * u, precision=precision, **_options(m)
            )
            w64, u64 = (np.asarray(x, np.float64) for x in (weight, u))
            z = np.zeros_like(u64)
            for _ in range(200):
                z = np.tanh(z @ w64.T + u64)
            yield {
                "d": d,
                "history": m,
                "dtype": jnp.dtype(dtype).name,
                "error": float(np.abs(np.asarray(out.value, np.float64) - z).max()),
                "unsuccessful": int(jnp.sum(out.status != 0)),
                "steps": int(jnp.max(out.num_steps)),
            }


def _layer(d: int, m: int, fuse: bool) -> nn.FixedPointLayer:
    cell = nn.AffineCell(d, d, dtype=jnp.float32, key=jr.key(1))
    weight, _ = _problem(1, d, jnp.float32)
    eye = jnp.eye(d, dtype=jnp.float32)
    parts = lambda c: (c.weight, c.injection)
    cell = eqx.tree_at(parts, cell, (weight, eye))
    solver: Any = eqlx.FixedPointIteration(0.0, TOLERANCE)
    if m > 0:
        solver = eqlx.Anderson(0.0, TOLERANCE, history_length=m)
    return nn.FixedPointLayer(cell, solver, fuse=fuse)


def layers(small: bool) -> Iterator[dict]:
    """A layer by its kernels against XLA's loops, forward and with the gradient."""
    for d, rows, slow in (
        (32, 4096, 0),
        (64, 4096, 0),
        (128, 256, 0),
        (128, 4096, 0),
        (128, 4096, 8),
        (128, 65536, 0),
    ):
        rows = 16 if small else rows
        _, u = _problem(rows, d, jnp.float32, slow=slow)
        for m in (0, 5):
            cases: dict[str, Callable[[], Any]] = {}
            for fuse in (True, False):
                arrays, static = eqx.partition(_layer(d, m, fuse), eqx.is_array)

                def loss(arrays, u, static=static):
                    return jnp.sum(jax.vmap(eqx.combine(arrays, static))(u) ** 2)

                forward = ft.partial(jax.jit(loss), arrays, u)
                both = ft.partial(jax.jit(jax.value_and_grad(loss)), arrays, u)
                name = "kernel" if fuse else "loop"
                cases |= {f"{name} forward": forward, f"{name} both": both}
            yield {"d": d, "rows": rows, "slow": slow, "history": m} | _milliseconds(
                cases
            )


def _evaluations(weight, u, num: int):
    """The floor: so many evaluations of the cell, and nothing else."""
    step = lambda _, z: jnp.tanh(
        lax.dot_general(z, weight, (((1,), (1,)), ((), ())), precision=_HIGHEST) + u
    )
    return lax.fori_loop(0, num, step, jnp.zeros_like(u))


def rooflines(small: bool) -> Iterator[dict]:
    """Operations and bytes a second, against those of a product and of a copy."""
    n = 256 if small else 8192
    square = jnp.ones((n, n), jnp.float32)
    big = jnp.ones(1 << (16 if small else 28), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=_HIGHEST))
    peak = _milliseconds({"product": lambda: product(square), "copy": lambda: big + 1})
    flops, bytes_ = 2 * n**3 / peak["product"], 2 * 4 * big.size / peak["copy"]
    yield {"teraflops": flops / 1e9, "gigabytes a second": bytes_ / 1e6}
    for d in (32, 64, 128):
        rows = 64 if small else 65536
        weight, u = _problem(rows, d, jnp.float32)
        solve = jax.jit(
            lambda w, u: affine_fixed_point(
                w, u, jnp.zeros_like(u), precision=_HIGHEST, **_options(0)
            )
        )
        steps = solve(weight, u).num_steps
        floor = jax.jit(ft.partial(_evaluations, num=int(jnp.max(steps)) + 1))
        cases = {
            "kernel": ft.partial(solve, weight, u),
            "evaluations alone": ft.partial(floor, weight, u),
        }
        times = _milliseconds(cases)
        work = 2 * d * d * float(jnp.sum(steps + 1)) / times["kernel"]
        moved = 4 * (2 * u.size + u.size) / times["kernel"]
        yield (
            {"d": d, "rows": rows}
            | times
            | {
                "of the operations of a product": work / flops,
                "of the bytes of a copy": moved / bytes_,
            }
        )


def block_sizes(small: bool) -> Iterator[dict]:
    """The tiles and warps that there are, and the ones that the kernel takes."""
    for d, m in ((32, 0), (64, 0), (128, 0), (64, 5), (128, 5)):
        rows = 64 if small else 16384
        weight, u = _problem(rows, d, jnp.float32)
        settings = Settings(jnp.tanh, 300, m, False, _HIGHEST)
        chosen = plan_of(d, jnp.dtype(jnp.float32), settings)
        knobs = Knobs(*map(jnp.float32, (0.0, TOLERANCE, 0.0, 1e-10, 2.0)))

        def run(plan, weight=weight, u=u, settings=settings, knobs=knobs):
            solve = ft.partial(triton.affine_fixed_point, settings=settings, plan=plan)
            return ft.partial(jax.jit(solve), weight, u, 0 * u, None, knobs)

        cases = {
            f"{tile} rows, {warps} warps": run(Plan(tile, warps, d))
            for tile in (4, 8, 16, 32, 64)
            for warps in (4, 8, 16)
            if tile * d <= 4096
        }
        if small:  # No compiler for a GPU.
            cases = {}
        taken = (
            None if chosen is None else f"{chosen.tile} rows, {chosen.num_warps} warps"
        )
        yield {"d": d, "history": m, "taken": taken} | _milliseconds(cases, 7)
