"""What gradients cost and how wrong they are: our adjoints, and ours against others'.

    python -m bench.gradients [bias] [peers] [--plot docs/gradients.png]

`bias`: each adjoint at several gains. Its bias is the relative error of the gradient in
the weight in float64, with the forward solve at 1e-12, so that it is the adjoint's own;
`error` is the same in float32, as timed. `peers`: the backward pass of other libraries
at an equal error of the gradient. Those that are not installed are left out.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import equilax as eqlx
import jax
import jax.numpy as jnp
import lineax as lx
from tqdm import tqdm

from .gradient_cell import (
    BATCH,
    Case,
    cell,
    compiled,
    gradient_of,
    loss,
    make_case,
    SIZE,
    WEIGHTS,
)
from .gradient_peers import print_peers
from .gradient_plot import plot
from .timing import compare, describe


GAINS = (0.5, 0.8, 0.95, 0.99)
MAX_STEPS = 512
TOLERANCES = {jnp.float64: 1e-12, jnp.float32: 1e-6}


def _anderson(tolerance: float):
    return eqlx.Anderson(0.0, tolerance)


def _broyden(tolerance: float):
    return eqlx.Broyden(0.0, tolerance, history_length=20)


def _reversible(tolerance: float):
    return eqlx.Reversible(0.0, tolerance)


@dataclasses.dataclass(frozen=True)
class Method:
    """An adjoint, and the solver of its forward pass."""

    adjoint: eqlx.AbstractAdjoint
    solver: Callable = _anderson
    max_steps: int = MAX_STEPS

    def solve(self, dtype) -> Callable:
        """`solve(w, xs, monitor)`, a layer under `jax.vmap`."""
        solver = self.solver(TOLERANCES[dtype])

        def one(x, w, monitor):
            return eqlx.fixed_point(
                cell,
                solver,
                jnp.zeros_like(x),
                (w, x),
                max_steps=self.max_steps,
                adjoint=self.adjoint,
                throw=False,
                monitor=monitor,
            ).value

        layer = jax.vmap(one, (0, None, None))
        return lambda w, xs, monitor=None: layer(xs, w, monitor)


def _methods() -> dict[str, Method]:
    implicit, shared = eqlx.ImplicitAdjoint, eqlx.SharedInverseAdjoint
    krylov = eqlx.KrylovLinearSolver()
    methods = {
        "implicit": Method(implicit()),
        "fixed point": Method(implicit(eqlx.FixedPointLinearSolver())),
        "Krylov": Method(implicit(krylov)),
        "LU": Method(implicit(lx.LU())),
        "Neumann(0)": Method(implicit(eqlx.Neumann(0))),
        "Neumann(1)": Method(implicit(eqlx.Neumann(1))),
        "Neumann(5)": Method(implicit(eqlx.Neumann(5))),
        "Neumann(10)": Method(implicit(eqlx.Neumann(10))),
        "Neumann(10, damp=0.5)": Method(implicit(eqlx.Neumann(10, damp=0.5))),
        "shared inverse": Method(shared(), _broyden),
        "shared, Neumann(3)": Method(shared(eqlx.Neumann(3)), _broyden),
        "shared, Krylov": Method(shared(krylov), _broyden),
        "checkpointed": Method(eqlx.RecursiveCheckpointAdjoint()),
    }
    # Its budget of steps is small: what it differentiates is a solve cut short.
    if (reversible := getattr(eqlx, "ReversibleAdjoint", None)) is not None:
        methods["reversible, 8 steps"] = Method(reversible(), _reversible, 8)
    return methods


@dataclasses.dataclass(frozen=True)
class Entry:
    """What an adjoint makes of one case. Times are in milliseconds."""

    bias: float
    error: float
    num_steps: float | None
    both: float
    backward: float

    def __str__(self):
        steps = "-" if self.num_steps is None else f"{self.num_steps:.1f}"
        times = f"{self.both:.2f} | {self.backward:.2f}"
        return f"{self.bias:.0e} | {self.error:.0e} | {times} | {steps}"


def steps_of(method: Method) -> Callable:
    """`fn(w, xs, cts)`, to be compiled: the adjoint's steps and solves of a batch."""
    solve = method.solve(jnp.float32)

    def watched(monitor, w, xs, cts):
        return loss(lambda w, xs: solve(w, xs, monitor))(w, xs, cts)

    def run(*args):
        if isinstance(method.adjoint, eqlx.RecursiveCheckpointAdjoint):
            return jnp.zeros(()), jnp.zeros(())  # No linear solve, and no monitor.
        seen = jax.grad(watched)(eqlx.AdjointMonitor(), *args)
        return seen.num_steps, seen.num_solves

    return run


class Bench:
    """All methods, compiled."""

    def __init__(self, case: Case, methods: dict[str, Method]):
        self.methods = methods
        self.singles, self.doubles, self.steps, self.forward = {}, {}, {}, {}
        self.seconds = {}
        args = case.arrays(jnp.float32)
        for name, method in tqdm(self.methods.items(), desc="compile", leave=False):
            solve = method.solve(jnp.float32)
            fn, seconds = compiled(gradient_of(solve), args)
            self.singles[name], self.seconds[name] = fn, seconds
            self.steps[name], _ = compiled(steps_of(method), args)
            key = method.solver, method.max_steps
            if key not in self.forward:
                self.forward[key], _ = compiled(loss(solve), args)
            with jax.enable_x64(True):
                double = case.arrays(jnp.float64)
                fn, _ = compiled(gradient_of(method.solve(jnp.float64)), double)
                self.doubles[name] = fn

    def bias(self, name: str, case: Case) -> float:
        with jax.enable_x64(True):
            grads = self.doubles[name](*case.arrays(jnp.float64))[1]
            return case.errors(grads)[0]

    def entry(self, name: str, case: Case, *, repeats: int) -> Entry:
        """Beside its own forward pass alone: what runs before it matters."""
        method, args = self.methods[name], case.arrays(jnp.float32)
        forward = self.forward[method.solver, method.max_steps]
        cases = {
            "forward": lambda: forward(*args),
            "both": lambda: self.singles[name](*args),
        }
        times = compare(cases, repeats=repeats, title=name)
        num_steps, num_solves = self.steps[name](*args)
        return Entry(
            bias=self.bias(name, case),
            error=case.errors(self.singles[name](*args)[1])[0],
            # None for what is not a linear solve.
            num_steps=float(num_steps / num_solves) if num_solves > 0 else None,
            both=times["both"],
            backward=times["both"] - times["forward"],
        )

    def memory(self, name: str) -> float:
        """What a gradient needs besides its inputs and outputs, in batches of `z`."""
        size = self.singles[name].memory_analysis().temp_size_in_bytes
        return size / (4 * BATCH * SIZE)


def print_bias(
    methods: dict[str, Method], *, repeats: int, weight: str
) -> dict[float, dict[str, Entry]]:
    """The tables of bias, and by gain and method what is in them."""
    cases = {gain: make_case(gain, weight) for gain in GAINS}
    bench = Bench(cases[GAINS[0]], methods)
    found: dict[float, dict[str, Entry]] = {}
    for gain, case in cases.items():
        print(f"\n| gain {gain} | bias | error | both ms | backward ms | steps |")
        print("|---" * 6 + "|")
        found[gain] = {}
        for name in tqdm(bench.methods, leave=False):
            entry = bench.entry(name, case, repeats=repeats)
            found[gain][name] = entry
            tqdm.write(f"| {name} | {entry} |")
    print("\n| adjoint | memory, in batches of z | compile s |\n|---|---|---|")
    for name, time in bench.seconds.items():
        print(f"| {name} | {bench.memory(name):.1f} | {time:.2f} |")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="bias, peers; both if none is named")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--weight", choices=list(WEIGHTS), default="symmetric")
    parser.add_argument("--gain", type=float, default=0.9, help="of the peers' cell")
    parser.add_argument("--skip", nargs="*", default=[], help="adjoints to leave out")
    parser.add_argument("--plot", type=Path, help="where to write the figure of bias")
    options = parser.parse_args()
    parts = options.parts or ["bias", "peers"]
    print(f"{describe()}; d={SIZE}, B={BATCH}, a {options.weight} weight")
    if "bias" in parts:
        methods = {k: m for k, m in _methods().items() if k not in options.skip}
        found = print_bias(methods, repeats=options.repeats, weight=options.weight)
        if options.plot:
            points = {
                gain: {k: (e.both, e.error) for k, e in entries.items()}
                for gain, entries in found.items()
            }
            plot(options.plot, points, subtitle=f"d={SIZE}, B={BATCH}; {describe()}")
    if "peers" in parts:
        case = make_case(options.gain, options.weight)
        print_peers(case, gain=options.gain, repeats=options.repeats)


if __name__ == "__main__":
    main()
