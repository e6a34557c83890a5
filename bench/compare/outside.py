"""Contenders that JAX does not run: SciPy on the host, TorchDEQ in a process."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from .measure import Entry, TOLERANCES
from .workload import Workload


class SciPy:
    """The whole batch as one problem. It has no gradients."""

    reason = "no gradients"

    def __init__(self, workload: Workload, method: str):
        self.workload, self.row = workload, f"SciPy, {method}, whole batch"
        self.method = getattr(scipy.optimize, method)
        args = workload.arrays()
        fn = jax.jit(workload.whole)
        self.fn = lambda zs: np.asarray(fn(jnp.asarray(zs, jnp.float32), args)) - zs
        self.start = np.zeros(workload.cts.shape, np.float32)

    def forward(self, tolerance: float) -> np.ndarray:
        try:
            return self.method(self.fn, self.start, f_tol=tolerance, maxiter=500)
        except scipy.optimize.NoConvergence as error:
            return np.asarray(error.args[0]).reshape(self.start.shape)

    def fit(self) -> Entry:
        entry, best = Entry("SciPy", reason=self.reason), np.inf
        for tolerance in TOLERANCES[1::2]:
            error = self.workload.value_error(self.forward(tolerance))
            best = min(best, error)
            if error <= self.workload.target:
                entry.tolerances, entry.value_error = (tolerance, tolerance), error
                return entry
        entry.reason = f"never within {self.workload.target:.0e} (best {best:.0e})"
        return entry


class TorchDEQ:
    """A process of another interpreter, which does as it is told over a pipe."""

    def __init__(self, workload: Workload, solver: str, python: str):
        self.workload, self.solver = workload, solver
        self.row = f"TorchDEQ, {solver}"
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "workload.npz"
        arrays: Any = {"xs": workload.xs, "cts": workload.cts}
        for i, leaf in enumerate(jax.tree.leaves(workload.params)):
            arrays[f"param{i}"] = leaf
        single: Any = {k: np.float32(v) for k, v in arrays.items()}
        np.savez(path, **single)
        script = Path(__file__).with_name("torch_worker.py")
        cell = getattr(workload.cell, "__name__", "")
        command = [
            python,
            str(script),
            str(path),
            cell,
            str(workload.max_steps),
            solver,
        ]
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self.ask("version")

    def ask(self, what: str, *tolerances: float) -> Any:
        self.process.stdin.write(json.dumps([what, *tolerances]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The process of TorchDEQ has ended.")
        return json.loads(line)

    def _errors(self, tolerances) -> tuple[float, float]:
        self.ask("save", *tolerances)
        with np.load(Path(self.folder.name) / "result.npz") as result:
            leaves = [result[f"grad{i}"] for i in range(len(result.files) - 1)]
            value = self.workload.value_error(result["zs"])
        return value, self.workload.gradient_error(tuple(leaves))

    def fit(self) -> Entry:
        entry, best = Entry("TorchDEQ"), np.inf
        for tolerance in TOLERANCES[1::2]:
            errors = self._errors((tolerance, tolerance))
            best = min(best, max(errors))
            if max(errors) <= self.workload.target:
                entry.tolerances = (tolerance, tolerance)
                entry.value_error, entry.gradient_error = errors
                break
        else:
            entry.reason = f"never within {self.workload.target:.0e} (best {best:.0e})"
            return entry
        for backward in TOLERANCES[1::2]:
            errors = self._errors((tolerance, backward))
            if max(errors) <= self.workload.target:
                entry.tolerances = (tolerance, backward)
                entry.value_error, entry.gradient_error = errors
                break
        return entry

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()
