"""Contenders that JAX does not run: SciPy on the host, PyTorch in a process."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from .contender import in_time
from .measure import Entry
from .torch_peer import SOLVERS, TorchPeer
from .workload import Workload


_METHODS = ("anderson", "broyden1", "newton_krylov")


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

    def forward(self, tolerance: float) -> tuple[Any, bool]:
        """Where it came to, and whether it came to an end."""
        has_ended = True
        try:
            x = self.method(self.fn, self.flat, f_tol=tolerance, maxiter=500)
        except (scipy.optimize.NoConvergence, ValueError) as error:
            x, has_ended = np.asarray(error.args[0]), False
            if x.size != self.flat.size:  # Not where it was, but that it diverged.
                x = np.full_like(self.flat, np.nan)
        return self.unravel(jnp.asarray(np.ravel(x), self.flat.dtype)), has_ended

    def fit(self) -> Entry:
        self._prepare()
        entry, best = Entry("SciPy", reason="no gradients"), np.inf
        for tolerance in self.workload.tolerances[1::2]:
            try:
                value, has_ended = in_time(lambda t=tolerance: self.forward(t))
            except TimeoutError as late:
                entry.reason = str(late)
                return entry
            error = self.workload.value_error(value)
            best = min(best, error)
            if error <= self.workload.target:
                entry.tolerances, entry.value_error = (tolerance, tolerance), error
                return entry
            if not has_ended:  # Nor will it with a tolerance that is smaller.
                break
        target = self.workload.target
        entry.reason = f"never within {target:.0e} in 500 steps (best {best:.0e})"
        return entry

    def cases(self, entry: Entry) -> dict[str, Callable[[], Any]]:
        if (tolerances := entry.tolerances) is None:
            return {}
        return {"forward": lambda: self.forward(tolerances[0])}

    def close(self) -> None:
        """There is nothing to close."""


def outsiders(workload: Workload, python: str | None) -> list[SciPy | TorchPeer]:
    """SciPy's, and PyTorch's if there is an interpreter that has it."""
    found: list[SciPy | TorchPeer] = [SciPy(workload, method) for method in _METHODS]
    if python is not None:
        found += [TorchPeer(workload, solver, python) for solver in SOLVERS]
    return found
