"""Time of a batch of solves over that of the evaluations of `fn` in it.

    python -m bench.overhead

The same number of evaluations of a cell, in a bare `lax.fori_loop` and within a solve
of as many steps, each in one jit and on the same batch.
"""

import argparse

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from .timing import compare, describe


NUM_STEPS = 50

_solvers = {
    "iteration": eqlx.FixedPointIteration(0.0, 0.0),
    "Anderson(5)": eqlx.Anderson(0.0, 0.0),
    "Anderson(10)": eqlx.Anderson(0.0, 0.0, history_length=10),
    "alternating(5)": eqlx.AlternatingAnderson(0.0, 0.0),
    "type I(5)": eqlx.AndersonTypeI(0.0, 0.0),
    "Broyden(10)": eqlx.Broyden(0.0, 0.0),
    "bad Broyden(10)": eqlx.BadBroyden(0.0, 0.0),
    "Reversible": eqlx.Reversible(0.0, 0.0),
}


def _cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


def _inputs(size: int, batch: int):
    """A cell of gain 0.9 and inputs of order one, in single precision."""
    w_key, x_key = jr.split(jr.key(0))
    w = jr.normal(w_key, (size, size)) * (0.45 / size**0.5)
    return w, jr.normal(x_key, (batch, size))


def _bare(w, xs):
    cell = jax.vmap(_cell, in_axes=(0, (None, 0)))
    # As many evaluations as a solve has steps, and the one that tests the last.
    return lax.fori_loop(
        0, NUM_STEPS + 1, lambda _, zs: cell(zs, (w, xs)), jnp.zeros_like(xs)
    )


def _solve(solver, w, xs):
    def one(x):
        return eqlx.fixed_point(
            _cell,
            solver,
            jnp.zeros_like(x),
            (w, x),
            max_steps=NUM_STEPS,
            throw=False,
        ).value

    return jax.vmap(one)(xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="unknowns of a sample")
    parser.add_argument("--batch", type=int, default=64, help="samples")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    w, xs = _inputs(options.size, options.batch)
    bare = jax.jit(_bare)
    cases = {"fori_loop": lambda: bare(w, xs)}
    for name, solver in _solvers.items():
        run = jax.jit(lambda w, xs, solver=solver: _solve(solver, w, xs))
        cases[name] = lambda run=run: run(w, xs)
    times = compare(cases, repeats=options.repeats, title="overhead")
    print(f"{describe()}; {options.batch} samples of {options.size} unknowns, float32")
    print(f"| {NUM_STEPS} steps | ms | times the evaluations |\n|---|---|---|")
    for name, time in times.items():
        print(f"| {name} | {time:.1f} | {time / times['fori_loop']:.2f} |")


if __name__ == "__main__":
    main()
