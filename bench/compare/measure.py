"""Find for each contender the setting that is good enough, then time them in turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from .contender import Contender
from .workload import Workload


TOLERANCES = tuple(10 ** (-k / 2) for k in range(3, 17))
_MOST_SECONDS = 90.0  # For the rounds of one workload.


@dataclasses.dataclass
class Entry:
    """What one contender makes of one workload; what it cannot do is `None`.

    **Attributes:**

    - `forward`, `both`: Milliseconds of the solutions, and of these with the gradient.
    - `memory`: Bytes that the program of both takes beyond its inputs and outputs.
    - `evaluations`: Of the cell, on one sample, in a forward solve: the mean.
    - `reason`: What it cannot do, and why.
    """

    library: str
    tolerances: tuple[float, float] | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    forward: float | None = None
    both: float | None = None
    compile_seconds: float | None = None
    memory: int | None = None
    evaluations: float | None = None
    reason: str = ""


class Compiled:
    """The two programs of a contender, made for any tolerances or for each anew."""

    def __init__(self, contender: Contender, workload: Workload):
        self.contender = contender
        self.workload = workload
        self.args = workload.arrays()
        self.made: dict[Any, Any] = {}
        self.seconds = 0.0

    def solve(self, cell, whole, tolerances, params, xs):
        make, most = self.contender.make, self.workload.max_steps
        starts = self.workload.starts(xs)
        forward, backward = tolerances
        if self.contender.is_whole:
            return make(whole, forward, backward, most)(starts, (params, xs))
        run = make(cell, forward, backward, most)
        return jax.vmap(lambda z, x: run(z, (params, x)))(starts, xs)

    def _program(self, name: str) -> Callable:
        work = self.workload

        def forward(tolerances, params, xs):
            return self.solve(work.cell, work.whole, tolerances, params, xs)

        def both(tolerances, params, xs):
            loss = lambda params, xs: work.loss(forward(tolerances, params, xs))
            return jax.grad(loss, (0, 1))(params, xs)

        return {"forward": forward, "both": both}[name]

    def __call__(self, name: str, tolerances: tuple[float, float]) -> Callable:
        """A compiled program, with everything that it takes."""
        static = self.contender.is_static
        key = (name, tolerances) if static else name
        if key not in self.made:
            fn = jax.jit(self._program(name), static_argnums=(0,) if static else ())
            start = time.perf_counter()
            self.made[key] = fn.lower(tolerances, *self.args).compile()
            self.seconds = time.perf_counter() - start
        made = self.made[key]
        before = () if static else (tolerances,)
        return lambda: made(*before, *self.args)

    def memory(self, tolerances) -> int:
        self("both", tolerances)
        key = ("both", tolerances) if self.contender.is_static else "both"
        return int(self.made[key].memory_analysis().temp_size_in_bytes)


def _is_good(compiled: Compiled, tolerances) -> tuple[bool, float, float | None]:
    work = compiled.workload
    value = work.value_error(compiled("forward", tolerances)())
    if value > work.target or compiled.contender.reason:
        return value <= work.target, value, None
    gradient = work.gradient_error(compiled("both", tolerances)())
    return gradient <= work.target, value, gradient


def fit(compiled: Compiled) -> Entry:
    """The coarsest tolerance that is good enough, then the coarsest backwards."""
    contender = compiled.contender
    entry = Entry(contender.library)
    grid = TOLERANCES[1::2] if contender.is_static else TOLERANCES
    grid = grid[:1] if contender.library == "unrolled" else grid
    best = float("inf")
    for tolerance in grid:
        try:
            is_good, *errors = _is_good(compiled, (tolerance, tolerance))
        except Exception as error:  # What a library raises is an answer too.
            entry.reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        best = min(best, max(e for e in errors if e is not None))
        if is_good:
            entry.tolerances, entry.reason = (tolerance, tolerance), contender.reason
            entry.value_error, entry.gradient_error = errors
            break
    else:
        entry.reason = entry.reason or f"never within {compiled.workload.target:.0e}"
        entry.reason += f" (best {best:.0e})"
        return entry
    if not (contender.is_tied or contender.is_static or contender.reason):
        _loosen(compiled, entry, grid)
    return entry


def _loosen(compiled: Compiled, entry: Entry, grid) -> None:
    assert entry.tolerances is not None
    for backward in grid:
        tolerances = (entry.tolerances[0], backward)
        is_good, *errors = _is_good(compiled, tolerances)
        if is_good:
            entry.tolerances = tolerances
            entry.value_error, entry.gradient_error = errors
            return


def count_evaluations(compiled: Compiled, tolerances) -> float:
    """Rows of the cell that a forward solve evaluates, for each sample."""
    work, rows = compiled.workload, []

    def counted(z, args):
        jax.debug.callback(lambda _: rows.append(None), z.ravel()[0])
        return work.cell(z, args)

    def whole(zs, args):
        params, xs = args
        return jax.vmap(lambda z, x: counted(z, (params, x)))(zs, xs)

    run = jax.jit(lambda p, xs: compiled.solve(counted, whole, tolerances, p, xs))
    jax.block_until_ready(run(*compiled.args))
    jax.effects_barrier()
    return len(rows) / len(work.xs)


def time_in_turns(
    cases: dict[tuple[str, str], Callable[[], Any]], *, repeats: int, title: str
) -> dict[tuple[str, str], float]:
    """Median milliseconds. Each round times every case once, in a changing order."""
    for run in cases.values():
        jax.block_until_ready(run())
    times: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    began = time.perf_counter()
    names = list(cases)
    for i in tqdm(range(repeats), desc=title, leave=False):
        if i >= 3 and time.perf_counter() - began > _MOST_SECONDS:
            break
        for key in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(cases[key]())
            times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(t) for key, t in times.items()}
