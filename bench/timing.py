"""Side by side in one process: medians after warm-up, with compilation apart."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import equilax as eqlx
import jax
import numpy as np

from .progress import progress


Name = TypeVar("Name")


def describe() -> str:
    """The device and the versions that belong to a number."""
    device = jax.devices()[0]
    here = machine()
    return (
        f"equilax {eqlx.__version__}, jax {jax.__version__}, "
        f"Python {here['Python']}, {len(jax.devices())} x "
        f"{device.device_kind} ({here['cores']} cores of {here['processor']})"
    )


def machine() -> dict[str, Any]:
    """What a time depends on besides the libraries."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    name = lines[0].split(":")[1].strip() if lines else platform.processor()
    return {
        "cores": len(lines) or os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "processor": name,
        "Python": platform.python_version(),
    }


def compare(
    cases: dict[Name, Callable[[], Any]],
    *,
    repeats: int,
    title: str,
    most_seconds: float = float("inf"),
) -> dict[Name, float]:
    """Median milliseconds. Each round times every case once, in an order of its own.

    **Arguments:**

    - `most_seconds`: For the rounds after the first three. A case that takes over ten
        times its share of them has those three alone.
    """
    for run in cases.values():
        jax.block_until_ready(run())
    times: dict[Name, list[float]] = {name: [] for name in cases}
    began, names = time.perf_counter(), list(cases)
    longest = 10 * 1e3 * most_seconds / (repeats * len(names))
    # Threads of a case go on waiting for work after it: no case has always the same
    # one before it.
    rng = np.random.default_rng(0)
    for i in progress(range(repeats), title):
        if i == 3:
            names = [n for n in names if statistics.median(times[n]) <= longest]
            began = time.perf_counter()
        if i >= 3 and time.perf_counter() - began > most_seconds:
            break
        for k in rng.permutation(len(names)):
            start = time.perf_counter()
            jax.block_until_ready(cases[names[k]]())
            times[names[k]].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def compile_times(
    cases: dict[str, Callable[[], tuple[Callable, tuple]]], *, repeats: int, title: str
) -> dict[str, float]:
    """The median seconds to trace, lower and compile what each case makes anew."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in progress(range(repeats), title):
        for name, make in cases.items():
            fn, args = make()
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(fn).lower(*args).compile()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def table(rows: dict[str, dict[str, float]], unit: str, baseline: str) -> str:
    """Rows of numbers and how many times smaller than the baseline each is."""
    names = list(next(iter(rows.values())))
    width = max(len(row) for row in rows)
    lines = [" " * width + "".join(f"{name:>26}" for name in names)]
    for row, values in rows.items():
        cells = [
            f"{v:9.2f} {unit} ({values[baseline] / v:6.2f}x)" for v in values.values()
        ]
        lines.append(f"{row:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)
