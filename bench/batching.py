"""A vmapped solve by each strategy, against `jax.vmap` of a plain `while_loop`.

python -m bench.batching [--plot docs/batching.png]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from .batching_plot import plot
from .timing import compare, compile_times, describe, table


SIZE, NUM, MAX_STEPS = 256, 256, 3000
RTOL, ATOL = 0.0, 1e-7
QUICK, SLOW = 0.45, 0.989
COUNTS = (0, 1, 2, 8, 26, 64, 256)

_strategies = {
    "Staged(4, 8)": eqlx.Staged(4, 8),
    "Staged(8, 8)": eqlx.Staged(8, 8),
    "Staged(4, 4)": eqlx.Staged(4, 4),
    "Staged(4, 2)": eqlx.Staged(4, 2),
    "Lockstep": eqlx.Lockstep(),
}


def cell(z, args):
    """Contracts by `rate`, where the largest eigenvalue of a symmetric `w` is one."""
    w, rate, x = args
    return jnp.tanh(rate * (w @ z) + x)


def problem(num_slow: int, num: int = NUM):
    q, _ = jnp.linalg.qr(jr.normal(jr.key(0), (SIZE, SIZE)))
    # Negative, so that a slow sample converges to something of the size of its input.
    w = (q * jnp.linspace(-1, -0.5, SIZE)) @ q.T
    where = np.random.default_rng(0).permutation(num)[:num_slow]
    rates = jnp.full(num, QUICK).at[where].set(SLOW)
    xs = 1e-2 * jr.normal(jr.key(1), (num, SIZE))
    return w, rates, xs


def plain(w, rate, x):
    """What one writes without a library: one sample, for `jax.vmap`."""

    def cond(carry):
        num_steps, z, f = carry
        return (num_steps < MAX_STEPS) & ~(jnp.max(jnp.abs(f - z)) < ATOL)

    def body(carry):
        num_steps, _, f = carry
        return num_steps + 1, f, cell(f, (w, rate, x))

    z0 = jnp.zeros_like(x)
    num_steps, z, _ = lax.while_loop(cond, body, (0, z0, cell(z0, (w, rate, x))))
    return z, num_steps


def ours(batching, solver=None, fn: Callable = cell):
    solver = eqlx.FixedPointIteration(RTOL, ATOL) if solver is None else solver

    def solve(w, rate, x):
        sol = eqlx.fixed_point(
            fn,
            solver,
            jnp.zeros_like(x),
            (w, rate, x),
            max_steps=MAX_STEPS,
            batching=batching,
            adjoint=eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver, 3000)),
            throw=False,
        )
        return sol.value, sol.stats["num_steps"]

    return solve


def over_batch(solve):
    return jax.jit(jax.vmap(solve, in_axes=(None, 0, 0)))


def check(strategies, args):
    """The same steps and values as the plain loop, or there is nothing to compare."""
    value, steps = over_batch(plain)(*args)
    for name, batching in strategies.items():
        got, got_steps = over_batch(ours(batching))(*args)
        assert np.array_equal(steps, got_steps), name
        assert np.max(np.abs(value - got)) < 1e-6, name
    return np.asarray(steps)


def count_rows(batching, args) -> int:
    """How many rows `cell` is evaluated on, counted by a callback from each."""
    rows = []

    def counted(z, args):
        jax.debug.callback(lambda _: rows.append(None), z[0])
        return cell(z, args)

    jax.block_until_ready(over_batch(ours(batching, fn=counted))(*args))
    jax.effects_barrier()
    return len(rows)


def forward_cases(strategies, args, solver=None):
    cases = {} if solver else {"plain": (over_batch(plain), args)}
    if solver:
        cases["plain"] = (over_batch(ours(eqlx.Vmapped(), solver)), args)
    for name, batching in strategies.items():
        cases[name] = (over_batch(ours(batching, solver)), args)
    return {name: (lambda f=f, a=a: f(*a)) for name, (f, a) in cases.items()}


def backward_cases(strategies, args):
    """The gradient alone: the forward solve ends where it starts."""
    cases = {}
    for name, batching in {"plain": eqlx.Vmapped(), **strategies}.items():
        run = over_batch(ours(batching))
        _, vjp = jax.vjp(lambda x, run=run: run(args[0], args[1], x)[0], args[2])
        ct = jnp.ones_like(args[2])
        pull = jax.jit(lambda ct, vjp=vjp: vjp(ct))
        cases[name] = lambda pull=pull, ct=ct: pull(ct)
    return cases


def mlp(z, args):
    w, rate, x = args
    return jnp.tanh(rate * (w @ jnp.tanh(w @ z + x)))


def compile_cases(strategies, solver):
    args = problem(0)

    def case(batching):
        return lambda: (jax.vmap(ours(batching, solver, mlp), (None, 0, 0)), args)

    cases = {"plain": case(eqlx.Vmapped())}
    return cases | {name: case(b) for name, b in strategies.items()}


def lone_cases(args, solver):
    one = (args[0], args[1][:1], args[2][:1])
    lone = (args[0], args[1][0], args[2][0])
    alone = jax.jit(ours(eqlx.Staged(), solver))
    batch = over_batch(ours(eqlx.Staged(), solver))
    return {
        "unbatched": lambda: alone(*lone),
        "batch of one": lambda: batch(*one),
    }


def untested_cases(num_steps: int):
    """So many steps without any test of convergence, and with it."""
    args = problem(0)
    solver = eqlx.FixedPointIteration(0.0, 0.0)

    def untested(w, rate, x):
        step = lambda _, z: cell(z, (w, rate, x))
        return lax.fori_loop(0, num_steps, step, jnp.zeros_like(x))

    def tested(w, rate, x):
        return eqlx.fixed_point(
            cell, solver, jnp.zeros_like(x), (w, rate, x), max_steps=num_steps
        ).value

    runs = {"untested": over_batch(untested), "tested": over_batch(tested)}
    return {name: lambda run=run: run(*args) for name, run in runs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", type=Path, help="where to write the figure")
    parser.add_argument("--all", action="store_true", help="more sizes of the stages")
    args = parser.parse_args()
    names = list(_strategies) if args.all else ["Lockstep"]
    strategies = {"Staged()": eqlx.Staged()} | {n: _strategies[n] for n in names}
    anderson = eqlx.Anderson(RTOL, ATOL)
    print(f"{describe()}; d={SIZE}, B={NUM}, median of {args.repeats}")

    ragged, equal = problem(2), problem(0)
    steps = check(strategies, ragged)
    print(f"two slow samples of {steps.max()} steps among samples of {steps.min()}")
    needed = int(np.sum(steps + 1))
    for name, batching in strategies.items():
        num = count_rows(batching, ragged)
        print(f"  {name}: {num} evaluations of a sample, {num / needed:.2f} x needed")

    repeats = args.repeats
    rows = {
        f"{n} slow, Picard": compare(
            forward_cases(strategies, problem(n)), repeats=repeats, title=f"{n} slow"
        )
        for n in COUNTS
    }
    rows["equal, Anderson"] = compare(
        forward_cases(strategies, equal, anderson), repeats=repeats, title="Anderson"
    )
    rows["2 slow, backward"] = compare(
        backward_cases(strategies, ragged), repeats=repeats, title="backward"
    )
    print(table(rows, "ms", "plain"))
    lone = {
        name: compare(lone_cases(equal, solver), repeats=20 * repeats, title="alone")
        for name, solver in (("Picard", None), ("Anderson", anderson))
    }
    print(table(lone, "ms", "unbatched"))
    share = {"100 steps": compare(untested_cases(100), repeats=repeats, title="share")}
    print(table(share, "ms", "untested"))
    compiling = {
        name: compile_times(compile_cases(strategies, solver), repeats=3, title=name)
        for name, solver in (("compile, Picard", None), ("compile, Anderson", anderson))
    }
    print(table(compiling, " s", "plain"))
    if args.plot:
        shown = {"plain", "Staged()", "Lockstep"}
        slow = {
            n: {k: v for k, v in rows[f"{n} slow, Picard"].items() if k in shown}
            for n in COUNTS
        }
        plot(args.plot, slow, num=NUM, subtitle=f"d={SIZE}; {describe()}")


if __name__ == "__main__":
    main()
