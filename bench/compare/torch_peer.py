"""Contenders in PyTorch, each a process that does as it is told over a pipe."""

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
import numpy as np

from .contender import in_time
from .measure import Entry, Tolerances
from .workload import Workload


# Those of TorchDEQ, and what people write without it.
SOLVERS = ("anderson", "broyden", "fixed_point_iter", "two loops")


class TorchPeer:
    """A process of an interpreter that has PyTorch, on the device that JAX is on."""

    def __init__(self, workload: Workload, solver: str, python: str):
        self.workload, self.solver, self.python = workload, solver, python
        self.library = "PyTorch" if solver == "two loops" else "TorchDEQ"
        self.row, self.version = f"{self.library}, {solver}", ""
        self.folder = tempfile.TemporaryDirectory()
        self.process: Any = None

    def _start(self) -> None:
        workload, cell = self.workload, self.workload.torch_cell
        path = Path(self.folder.name) / "workload.npz"
        params = jax.tree.leaves(workload.params)
        arrays: Any = {f"param{i}": x for i, x in enumerate(params)}
        add_axis = lambda x: x[None] if workload.is_single else x
        arrays |= {"cts": add_axis(workload.cts), "start": add_axis(workload.starts())}
        if not workload.is_single:
            arrays["xs"] = workload.xs
        cast = lambda x: np.asarray(x, workload.dtype)
        cast_all: Any = {name: cast(x) for name, x in arrays.items()}
        np.savez(path, labels=workload.labels, **cast_all)
        script = str(Path(__file__).with_name("torch_worker.py"))
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        options = [str(path), cell, str(workload.max_steps), self.solver, device]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [self.python, script, *options], stdin=pipe, stdout=pipe, text=True
        )
        self.version = self.ask("version")

    def ask(self, what: str, *numbers: float) -> Any:
        self.process.stdin.write(json.dumps([what, *numbers]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The process of PyTorch has ended.")
        return json.loads(line)

    def _errors(self, tolerances: Tolerances) -> tuple[float, float]:
        self.ask("save", *tolerances)
        with np.load(Path(self.folder.name) / "result.npz") as result:
            leaves = [result[f"grad{i}"] for i in range(len(result.files) - 1)]
            value = self.workload.value_error(result["zs"])
        if not self.workload.has_gradient:
            return value, 0.0
        return value, self.workload.gradient_error(tuple(leaves))

    def fit(self) -> Entry:
        entry = Entry(self.library)
        if not self.workload.torch_cell:
            entry.reason = "a state of several dtypes, which it would make one of"
            return entry
        try:
            self._start()
        except RuntimeError as error:
            entry.reason = str(error)
            return entry
        return self._fit(entry)

    def _fit(self, entry: Entry) -> Entry:
        best = np.inf
        grid, target = self.workload.tolerances[1::2], self.workload.target
        for tolerance in grid:
            try:
                errors = in_time(lambda t=tolerance: self._errors((t, t)))
            except TimeoutError as late:
                entry.reason = str(late)
                return entry
            best = min(best, max(errors))
            if max(errors) <= target:
                break
        else:
            entry.reason = f"never within {target:.0e} (best {best:.0e})"
            return entry
        tolerances = (tolerance, tolerance)
        for backward in grid:
            looser = self._errors((tolerance, backward))
            if max(looser) <= target:
                tolerances, errors = (tolerance, backward), looser
                break
        entry.tolerances = tolerances
        entry.value_error, entry.gradient_error = errors
        if not self.workload.has_gradient:
            entry.gradient_error, entry.reason = None, "nothing to differentiate in"
        entry.threads = self._choose_threads(tolerances)
        return entry

    def _choose_threads(self, tolerances: Tolerances) -> int:
        """One, or all: whichever is the quicker, with the gradient if there is one."""
        times = {}
        for number in dict.fromkeys((1, os.cpu_count() or 1)):
            self.ask("threads", number)
            num = 1 if self._seconds(tolerances) > 1 else 5
            times[number] = statistics.median(
                self._seconds(tolerances) for _ in range(num)
            )
        best = min(times, key=lambda number: times[number])
        self.ask("threads", best)
        return best

    def _seconds(self, tolerances: Tolerances) -> float:
        kind = "both" if self.workload.has_gradient else "forward"
        start = time.perf_counter()
        self.ask(kind, *tolerances)
        return time.perf_counter() - start

    def cases(self, entry: Entry) -> dict[str, Callable[[], Any]]:
        if (tolerances := entry.tolerances) is None:
            return {}
        forward, backward = tolerances
        kinds = ["forward", "both"] if self.workload.has_gradient else ["forward"]
        kinds += ["step"] if self.workload.update is not None else []
        return {k: lambda k=k: self.ask(k, forward, backward) for k in kinds}

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
        self.folder.cleanup()
