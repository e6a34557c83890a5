"""The backward pass of other libraries, and ours, at an equal error of the gradient.

Each has the coarsest tolerances with which its gradient is good enough, and is timed
side by side with ours.
"""

from collections.abc import Callable

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .compare.contender import Contender
from .compare.libraries import all_contenders, versions
from .compare.ours import by_equilax
from .gradient_cell import Case, cell, loss
from .timing import compare


TARGET = 1e-5
MAX_STEPS = 500
OURS = "equilax, Anderson"
_TOLERANCES = tuple(10 ** (-k / 2) for k in range(6, 15))
_COLUMNS = (
    "tolerances",
    "dW",
    "dx",
    "forward ms",
    "both ms",
    "backward ms",
    "backward / forward",
    "backward, times ours",
)


def _whole(zs, args):
    w, xs = args
    return jnp.tanh(zs @ w.T + xs)


def _peers() -> dict[str, Contender]:
    """Those of `python -m bench` that have a gradient to solve for, and one more."""
    make = by_equilax(eqlx.Anderson, batch_axis=0)
    one = Contender(
        "equilax", "Anderson, batch_axis", make, is_whole=True, is_tied=True
    )
    found = [c for c in all_contenders() if not c.reason and c.library != "unrolled"]
    ours_first = sorted([*found, one], key=lambda c: c.library != "equilax")
    return {c.row: c for c in ours_first}


class Compiled:
    """A peer's forward pass and gradient, functions of its tolerances."""

    def __init__(self, peer: Contender, args):
        def solve(tolerances, w, xs):
            fn, (before, after) = _whole if peer.is_whole else cell, tolerances
            run = peer.make(fn, before, after, MAX_STEPS)
            if peer.is_whole:
                return run(jnp.zeros_like(xs), (w, xs))
            return jax.vmap(lambda x: run(jnp.zeros_like(x), (w, x)))(xs)

        def forward(tolerances, *args):
            return loss(lambda w, xs: solve(tolerances, w, xs))(*args)

        gradient = jax.value_and_grad(forward, (1, 2))
        static = (0,) if peer.is_static else ()
        self.runs = {
            "forward": jax.jit(forward, static_argnums=static),
            "both": jax.jit(gradient, static_argnums=static),
        }
        self.args = args

    def cases(self, tolerances, prefix="") -> dict[str, Callable]:
        return {
            prefix + name: lambda run=run: run(tolerances, *self.args)
            for name, run in self.runs.items()
        }

    def errors(self, case: Case, tolerances) -> tuple[float, ...]:
        try:
            return case.errors(self.runs["both"](tolerances, *self.args)[1])
        except eqx.EquinoxRuntimeError:  # A linear solve of Lineax's that failed.
            return (np.inf, np.inf)


def _coarsest(
    case: Case, peer: Contender, compiled: Compiled
) -> tuple[float, float] | None:
    """The coarsest tolerance with which the gradient is good, then that backwards."""
    is_good = lambda *pair: max(compiled.errors(case, pair)) <= TARGET
    # Those that are static cost a compilation each.
    candidates = _TOLERANCES[::2] if peer.is_static else _TOLERANCES
    both = next((t for t in candidates if is_good(t, t)), None)
    if both is None or peer.is_static or peer.is_tied:
        return None if both is None else (both, both)
    return both, next(t for t in candidates if is_good(both, t))


def _row(tolerances, errors, times: dict[str, float]) -> list[str]:
    backward = times["both"] - times["forward"]
    ours = times["our both"] - times["our forward"]
    numbers = (times["forward"], times["both"], backward, backward / times["forward"])
    return [
        ", ".join(f"{t:.0e}" for t in dict.fromkeys(tolerances)),
        *(f"{error:.0e}" for error in errors),
        *(f"{number:.2f}" for number in numbers),
        f"{backward / ours:.2f}",
    ]


def print_peers(case: Case, *, gain: float, repeats: int) -> None:
    args = case.arrays(jnp.float32)
    print(", ".join(f"{k} {v or 'is not installed'}" for k, v in versions().items()))
    peers = _peers()
    print(f"\n| gain {gain}, float32 | " + " | ".join(_COLUMNS) + " |")
    print("|---" * (1 + len(_COLUMNS)) + "|")
    ours = Compiled(peers[OURS], args)
    base = _coarsest(case, peers[OURS], ours)
    assert base is not None
    for name, peer in tqdm(peers.items(), leave=False):
        compiled = Compiled(peer, args)
        tolerances = _coarsest(case, peer, compiled)
        if tolerances is None:
            tqdm.write(f"| {name} | never within {TARGET:.0e} |" + " - |" * 7)
            continue
        runs = compiled.cases(tolerances) | ours.cases(base, "our ")
        times = compare(runs, repeats=repeats, title=name)
        row = _row(tolerances, compiled.errors(case, tolerances), times)
        tqdm.write(f"| {name} | " + " | ".join(row) + " |")
