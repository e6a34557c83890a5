"""The memory that a process takes at its peak, measured while it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


if not Path("/proc/self/status").exists():
    pytest.skip("Only Linux tells the peak of a process.", allow_module_level=True)

# Gradients of one compiled program, for inputs on which it takes few steps and many.
# Printed are the steps, the peak so far and how far off the gradient is. At the end the
# same by a loop that stores its iterates.
_GRADIENTS = """
import json, re

import equilax as eqlx
import jax
import jax.numpy as jnp

SIZE = 1 << 16

def affine(z, args):
    gains, x = args
    return gains * z + x

def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read()).group(1)) << 10

def solved(adjoint):
    def loss(gains, x, monitor):
        sol = eqlx.fixed_point(
            affine,
            eqlx.FixedPointIteration(0.0, 1e-3),
            jnp.zeros(SIZE),
            (gains, x),
            max_steps=2000,
            adjoint=adjoint,
            throw=False,
            monitor=monitor,
        )
        return jnp.sum(sol.value), sol.stats["num_steps"]
    grad = jax.jit(jax.grad(loss, (0, 2), has_aux=True))
    def run(gains, x):
        (grads, seen), num_steps = grad(gains, x, eqlx.AdjointMonitor())
        return grads, [int(num_steps), int(seen.num_steps)]
    return run

def stored(gains, x):
    def loss(gains):
        step = lambda z, _: (affine(z, (gains, x)), None)
        return jnp.sum(jax.lax.scan(step, jnp.zeros(SIZE), None, length=1000)[0])
    return jax.jit(jax.grad(loss))(gains), [1000, 1000]

lean = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver())
found = {}
for name, run, gains_of in (
    ("lean", solved(lean), (0.5, 0.5, 0.995)),
    ("default", solved(eqlx.ImplicitAdjoint()), (0.5, 0.5, 0.995)),
    ("stored", stored, (0.5,)),
):
    found[name] = []
    for gain in gains_of:
        gains, x = jnp.linspace(0, gain, SIZE), jnp.ones(SIZE)
        grads, steps = run(gains, x)
        expected = x / (1 - gains) ** 2
        error = float(jnp.max(jnp.abs(grads / expected - 1)))
        found[name].append({"steps": steps, "peak": peak(), "error": error})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_peak_of_a_backward_pass_does_not_depend_on_the_steps_taken():
    process = subprocess.run(
        [sys.executable, "-c", _GRADIENTS],
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    found = json.loads(process.stdout)
    size = 4 << 16  # Of one iterate.
    for name in ("lean", "default"):
        _, few, many = found[name]
        assert few["steps"][0] < 15
        assert many["steps"][0] > 1_000
        assert many["steps"][1] > 200
        # The tolerance of 1e-3 is magnified by `1 / (1 - gain)`, once in the solution,
        # once in the adjoint, and both are in the product.
        assert few["error"] < 1e-2
        assert many["error"] < 1e-2
        assert many["peak"] - few["peak"] < 64 * size
    # The measure would see them.
    assert found["stored"][0]["peak"] - found["default"][-1]["peak"] > 900 * size
