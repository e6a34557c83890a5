"""Weak scaling: the same work on each of 1, 2, 4 and 8 host devices.

python -m bench.sharding
"""

import argparse

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec as P

from .timing import compare, describe


SIZE, NUM, NUM_STEPS = 256, 128, 40
QUICK, SLOW = 0.6, 0.99
COUNTS = (1, 2, 4, 8)


def _cell(z, args):
    w, rate, x = args
    return jnp.tanh(rate * (w @ z) + x)


def _solved(w, rate, x):
    solver = eqlx.FixedPointIteration(0.0, 1e-6)
    args = (w, rate, x)
    return eqlx.fixed_point(
        _cell, solver, jnp.zeros_like(x), args, max_steps=2000, throw=False
    ).value


def _counted(w, rate, x):
    """The same without a solve: a number of evaluations, and of them backwards."""
    step = lambda z, _: (_cell(z, (w, rate, x)), None)
    return lax.scan(step, jnp.zeros_like(x), length=NUM_STEPS)[0]


def _problem(num_devices: int, is_ragged: bool):
    q, _ = jnp.linalg.qr(jr.normal(jr.key(0), (SIZE, SIZE)))
    w = (q * jnp.linspace(-1, -0.5, SIZE)) @ q.T
    num = NUM * num_devices
    rates = jnp.full(num, QUICK)
    rates = rates.at[0].set(SLOW) if is_ragged else rates
    return w, rates, 1e-2 * jr.normal(jr.key(1), (num, SIZE))


def _mesh(num_devices: int) -> Mesh:
    devices = jax.devices()[:num_devices]
    return jax.make_mesh(
        (num_devices,), ("b",), axis_types=(AxisType.Auto,), devices=devices
    )


def _gradient(fn, mesh: Mesh, is_spread: bool):
    """A step of training: the gradient in `w`, by `shard_vmap` or by `jit` alone."""
    if is_spread:
        run = eqlx.sharding.shard_vmap(fn, mesh, "b", in_axes=(None, 0, 0))
    else:
        run = jax.vmap(fn, in_axes=(None, 0, 0))
    return jax.jit(jax.grad(lambda w, *batch: jnp.mean(run(w, *batch) ** 2)))


def _cases(num_devices: int, is_ragged: bool):
    mesh = _mesh(num_devices)
    w, *batch = _problem(num_devices, is_ragged)
    put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    args = put(w, P()), *(put(x, P("b")) for x in batch)
    steps = {
        "shard_vmap": _gradient(_solved, mesh, True),
        "jit alone": _gradient(_solved, mesh, False),
        "without a solve": _gradient(_counted, mesh, True),
    }
    return {
        f"{name}, {num_devices}": lambda step=step: step(*args)
        for name, step in steps.items()
    }


def report(is_ragged: bool, repeats: int):
    cases = {}
    for num_devices in COUNTS:
        cases |= _cases(num_devices, is_ragged)
    kind = "one slow sample on the first device" if is_ragged else "equal samples"
    times = compare(cases, repeats=repeats, title=kind)
    rows = []
    for n in COUNTS:
        spread, alone, counted = (
            times[f"{name}, {n}"]
            for name in ("shard_vmap", "jit alone", "without a solve")
        )
        growth = spread / times["shard_vmap, 1"]
        floor = counted / times["without a solve, 1"]
        rows.append(
            [
                n,
                f"{spread:.1f}",
                f"{alone:.1f}",
                f"{counted:.1f}",
                f"{growth / floor:.2f}",
            ]
        )
    print(f"\n{kind.capitalize()}, milliseconds of a gradient\n")
    head = ["devices", "`shard_vmap`", "`jit` alone", "without a solve"]
    head = [*head, "growth, relative to that without a solve"]
    for row in (head, ["---:"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(COUNTS))
    print(describe())
    for is_ragged in (False, True):
        report(is_ragged, args.repeats)


if __name__ == "__main__":
    main()
