"""Find for each contender the setting that is good enough."""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .contender import Contender, in_time
from .workload import Workload


Tolerances = tuple[float, float]

KINDS = ("forward", "both", "step")


@dataclasses.dataclass
class Entry:
    """What one contender makes of one workload; what it cannot do is `None`.

    **Attributes:**

    - `forward`, `both`, `step`: Milliseconds of the solutions, of these with the
        gradient, and of a step of training.
    - `compile_seconds`, `memory`: Of the program of both: to make it, and the bytes
        that it takes beyond its inputs and outputs. `step_memory` is that of a step.
    - `evaluations`, `products`: Of the cell in a forward solve, and with its transposed
        Jacobian in a backward pass, on one sample: the mean.
    - `threads`: How many it runs in, if that was chosen.
    - `reason`: What it cannot do, and why.
    """

    library: str
    tolerances: Tolerances | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    forward: float | None = None
    both: float | None = None
    step: float | None = None
    compile_seconds: float | None = None
    memory: int | None = None
    step_memory: int | None = None
    evaluations: float | None = None
    products: float | None = None
    threads: int | None = None
    reason: str = ""


def _check_memory(program: Any) -> None:
    """An error for what would take more than half of the memory that there is."""
    stats = jax.devices()[0].memory_stats() or {}
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    there = stats.get("bytes_limit", of_host)
    needed = program.memory_analysis().temp_size_in_bytes
    if needed > there / 2:
        raise MemoryError(f"{needed / 2**30:.0f} GiB of {there / 2**30:.0f}")


class Compiled:
    """The programs of a contender, made for any tolerances or for each anew."""

    def __init__(self, contender: Contender, workload: Workload):
        self.contender = contender
        self.workload = workload
        self.arrays = workload.arrays()
        self.made: dict[Any, Any] = {}
        self.seconds: dict[str, float] = {}

    def solve(self, cell, whole, tolerances, params, xs):
        work, make = self.workload, self.contender.make
        starts = work.starts()
        forward, backward = tolerances
        if work.is_single or self.contender.is_whole:
            fn = cell if work.is_single else whole
            return make(fn, forward, backward, work.max_steps)(starts, (params, xs))
        run = make(cell, forward, backward, work.max_steps)
        return jax.vmap(lambda z, x: run(z, (params, x)))(starts, xs)

    def _program(self, name: str) -> Callable:
        work = self.workload

        def forward(tolerances, params, xs):
            return self.solve(work.cell, work.whole, tolerances, params, xs)

        def loss(params, xs, tolerances):
            return work.loss(forward(tolerances, params, xs), params)

        def both(tolerances, params, xs):
            return jax.grad(loss, (0, 1))(params, xs, tolerances)

        def step(tolerances, params, xs, memory):
            assert work.update is not None
            return work.update(params, jax.grad(loss)(params, xs, tolerances), memory)

        return {"forward": forward, "both": both, "step": step}[name]

    def _key(self, name: str, tolerances: Tolerances):
        return (name, tolerances) if self.contender.is_static else name

    def has(self, name: str, tolerances: Tolerances) -> bool:
        return self._key(name, tolerances) in self.made

    def __call__(self, name: str, tolerances: Tolerances) -> Callable:
        """A compiled program, with everything that it takes."""
        static, key = self.contender.is_static, self._key(name, tolerances)
        args = self.arrays + ((self.workload.memory,) if name == "step" else ())
        # Moved to the device once, and not in each call.
        given: Any = tolerances if static else tuple(map(jnp.asarray, tolerances))
        if key not in self.made:
            fn = jax.jit(self._program(name), static_argnums=(0,) if static else ())
            start = time.perf_counter()
            program = fn.lower(given, *args).compile()
            self.seconds[name] = time.perf_counter() - start
            _check_memory(program)
            self.made[key] = program
        made = self.made[key]
        return lambda: made(*(() if static else (given,)), *args)

    def memory(self, name: str, tolerances: Tolerances) -> int:
        self(name, tolerances)
        made = self.made[self._key(name, tolerances)]
        return int(made.memory_analysis().temp_size_in_bytes)


def _try(compiled: Compiled, kind: str, tolerances: Tolerances) -> Any:
    program = compiled(kind, tolerances)
    return in_time(lambda: jax.block_until_ready(program()))


def fit(compiled: Compiled) -> Entry:
    """The coarsest tolerance that is good enough, then the coarsest backwards.

    Without a gradient that is, the coarsest of the solutions alone.
    """
    contender, work = compiled.contender, compiled.workload
    entry = Entry(contender.library, reason=contender.reason)
    if not work.has_gradient:
        entry.reason = entry.reason or "nothing to differentiate in"
    grid = work.tolerances[1::2] if contender.is_static else work.tolerances
    grid = grid[:1] if contender.library == "unrolled" else grid
    least = {"forward": float("inf"), "both": float("inf")}
    for tolerance in grid:
        pair, kind = (tolerance, tolerance), "forward"
        try:
            value = work.value_error(_try(compiled, kind, pair))
            least[kind] = min(least[kind], value)
            if value > work.target and not contender.is_exempt:
                continue
            if entry.tolerances is None:
                entry.tolerances, entry.value_error = pair, value
            if contender.reason or not work.has_gradient:
                return entry
            kind = "both"
            gradient = work.gradient_error(_try(compiled, kind, pair))
            least[kind] = min(least[kind], gradient)
        except TimeoutError as error:  # With a smaller tolerance it takes no less.
            entry.reason = str(error)
            return entry
        except Exception as error:  # What a library raises is an answer too.
            first = (str(error).splitlines() or [""])[0]
            entry.reason = f"{type(error).__name__}: {first[:80]}"
            if not compiled.has(kind, pair):  # So it is at each tolerance.
                return entry
            continue
        if gradient <= work.target or contender.is_exempt:
            entry.tolerances, entry.reason = pair, ""
            entry.value_error, entry.gradient_error = value, gradient
            break
    else:
        missed = "forward" if entry.tolerances is None else "both"
        what = "" if missed == "forward" else ", its gradient"
        never = f"never within {work.target:.0e}{what} (best {least[missed]:.0e})"
        is_told = entry.reason and least[missed] == float("inf")
        entry.reason = entry.reason if is_told else never
        return entry
    if not (contender.is_tied or contender.is_static or contender.is_exempt):
        _loosen(compiled, entry, grid)
    return entry


def _loosen(compiled: Compiled, entry: Entry, grid) -> None:
    assert entry.tolerances is not None
    work = compiled.workload
    for backward in grid:
        pair = (entry.tolerances[0], backward)
        try:
            gradient = work.gradient_error(_try(compiled, "both", pair))
        except Exception:  # A linear solve that failed, or goes on and on.
            continue
        if gradient <= work.target:
            entry.tolerances, entry.gradient_error = pair, gradient
            return
