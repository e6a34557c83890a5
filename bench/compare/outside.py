"""Contenders that JAX does not run: SciPy on the host, TorchDEQ in a process."""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from .measure import Entry, Tolerances
from .workload import Workload


_METHODS = ("anderson", "broyden1", "newton_krylov")
_SOLVERS = ("anderson", "broyden", "fixed_point_iter")
# What `torch_worker.py` has.
_CELLS = ("tanh_cell", "scaled_cell", "convolution", "transformer", "affine")


class SciPy:
    """The whole batch as one problem. It has no gradients."""

    version = ""

    def __init__(self, workload: Workload, method: str):
        self.workload, self.row = workload, f"SciPy, {method}, whole batch"
        self.method = getattr(scipy.optimize, method)

    def _prepare(self) -> None:
        work = self.workload
        flat, self.unravel = ravel_pytree(work.starts())
        args = work.arrays()
        whole = lambda x: ravel_pytree(work.whole(self.unravel(x), args))[0]
        fn = jax.jit(whole)
        self.fn = lambda x: np.asarray(fn(jnp.asarray(x, flat.dtype))) - x
        self.flat = np.asarray(flat)

    def forward(self, tolerance: float) -> Any:
        try:
            x = self.method(self.fn, self.flat, f_tol=tolerance, maxiter=500)
        except (scipy.optimize.NoConvergence, ValueError) as error:
            x = np.asarray(error.args[0])
            if x.size != self.flat.size:  # Not where it was, but that it diverged.
                x = np.full_like(self.flat, np.nan)
        return self.unravel(jnp.asarray(np.ravel(x), self.flat.dtype))

    def fit(self) -> Entry:
        self._prepare()
        entry, best = Entry("SciPy", reason="no gradients"), np.inf
        for tolerance in self.workload.tolerances[1::2]:
            error = self.workload.value_error(self.forward(tolerance))
            best = min(best, error)
            if error <= self.workload.target:
                entry.tolerances, entry.value_error = (tolerance, tolerance), error
                return entry
        target = self.workload.target
        entry.reason = f"never within {target:.0e} in 500 steps (best {best:.0e})"
        return entry

    def cases(self, entry: Entry) -> dict[str, Callable[[], Any]]:
        if (tolerances := entry.tolerances) is None:
            return {}
        return {"forward": lambda: self.forward(tolerances[0])}

    def close(self) -> None:
        """There is nothing to close."""


class TorchDEQ:
    """A process of another interpreter, which does as it is told over a pipe."""

    def __init__(self, workload: Workload, solver: str, python: str):
        self.workload, self.row, self.version = workload, f"TorchDEQ, {solver}", ""
        cell = getattr(workload.cell, "__name__", "")
        self.folder, self.process = tempfile.TemporaryDirectory(), None
        if cell not in _CELLS:
            return
        path = Path(self.folder.name) / "workload.npz"
        params = jax.tree.leaves(workload.params)
        arrays: Any = {f"param{i}": np.float32(x) for i, x in enumerate(params)}
        arrays |= {"xs": np.float32(workload.xs), "cts": np.float32(workload.cts)}
        np.savez(path, labels=workload.labels, **arrays)
        script = str(Path(__file__).with_name("torch_worker.py"))
        options = [str(path), cell, str(workload.max_steps), solver]
        pipe = subprocess.PIPE
        self.process: Any = subprocess.Popen(
            [python, script, *options], stdin=pipe, stdout=pipe, text=True
        )
        self.version = self.ask("version")

    def ask(self, what: str, *numbers: float) -> Any:
        self.process.stdin.write(json.dumps([what, *numbers]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The process of TorchDEQ has ended.")
        return json.loads(line)

    def _errors(self, tolerances: Tolerances) -> tuple[float, float]:
        self.ask("save", *tolerances)
        with np.load(Path(self.folder.name) / "result.npz") as result:
            leaves = [result[f"grad{i}"] for i in range(len(result.files) - 1)]
            value = self.workload.value_error(result["zs"])
        return value, self.workload.gradient_error(tuple(leaves))

    def fit(self) -> Entry:
        entry, best = Entry("TorchDEQ"), np.inf
        if self.process is None:
            entry.reason = "its cell is not written in PyTorch"
            return entry
        grid, target = self.workload.tolerances[1::2], self.workload.target
        for tolerance in grid:
            errors = self._errors((tolerance, tolerance))
            best = min(best, max(errors))
            if max(errors) <= target:
                break
        else:
            entry.reason = f"never within {target:.0e} (best {best:.0e})"
            return entry
        for backward in grid:  # Ends with that of the forward solve at the latest.
            errors = self._errors((tolerance, backward))
            if max(errors) <= target:
                break
        entry.tolerances = tolerances = (tolerance, backward)
        entry.value_error, entry.gradient_error = errors
        entry.threads = self._choose_threads(tolerances)
        return entry

    def _choose_threads(self, tolerances: Tolerances) -> int:
        """One, or all: whichever is the quicker with the gradient."""
        times = {}
        for number in dict.fromkeys((1, os.cpu_count() or 1)):
            self.ask("threads", number)
            self.ask("both", *tolerances)
            times[number] = statistics.median(
                self._seconds(tolerances) for _ in range(5)
            )
        best = min(times, key=lambda number: times[number])
        self.ask("threads", best)
        return best

    def _seconds(self, tolerances: Tolerances) -> float:
        start = time.perf_counter()
        self.ask("both", *tolerances)
        return time.perf_counter() - start

    def cases(self, entry: Entry) -> dict[str, Callable[[], Any]]:
        if (tolerances := entry.tolerances) is None:
            return {}
        kinds = ["forward", "both"]
        kinds += ["step"] if self.workload.update is not None else []
        return {k: lambda k=k: self.ask(k, *tolerances) for k in kinds}

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
        self.folder.cleanup()


def outsiders(workload: Workload, python: str | None) -> list[SciPy | TorchDEQ]:
    """SciPy's, and TorchDEQ's if there is an interpreter that has it."""
    found: list[SciPy | TorchDEQ] = [SciPy(workload, method) for method in _METHODS]
    if python is not None:
        found += [TorchDEQ(workload, solver, python) for solver in _SOLVERS]
    return found
