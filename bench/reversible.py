"""Error of the gradient through a reversible solve, and what the adjoint says of it.

    python -m bench.reversible

The problem of McCallum, Arora and Foster (2025), arXiv 2509.12917: a tanh cell of width
64. A step here is one evaluation of `fn`, of which a step of theirs has two.
"""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from .timing import describe


SIZE = 64
_NUM_STEPS = (4, 8, 12, 24, 48)
_BETAS = (0.5, 0.8, 0.9)
_GAINS = (0.5, 0.9)


def cell(y, args):
    w, x = args
    return jnp.tanh(w @ y + x)


def _unrolled(w, x, beta, num):
    def step(pair, _):
        old, y = pair
        return (y, (1 - beta) * old + beta * cell(y, (w, x))), None

    start = jnp.zeros_like(x)
    return lax.scan(step, (start, start), None, length=num)[0][1]


def gradient_error(gain, beta, dtype, num):
    """The error in `w`, the estimate of it, and the steps that were undone."""
    keys = jr.split(jr.key(0), 3)
    w = jr.normal(keys[0], (SIZE, SIZE), jnp.float64)
    w = (gain * w / jnp.linalg.norm(w, 2)).astype(dtype)
    x = jr.normal(keys[1], (SIZE,), jnp.float64).astype(dtype)
    c = jr.normal(keys[2], (SIZE,), jnp.float64)
    adjoint = eqlx.ReversibleAdjoint(max_error=jnp.inf)

    def loss(w, monitor):
        sol = eqlx.fixed_point(
            cell,
            eqlx.Reversible(0.0, 0.0, beta=beta),
            jnp.zeros(SIZE, dtype),
            (w, x),
            max_steps=num,
            adjoint=adjoint,
            monitor=monitor,
            throw=False,
        )
        return jnp.sum(c * sol.value.astype(jnp.float64))

    def exact(w):
        return jnp.sum(c * _unrolled(w, x.astype(jnp.float64), beta, num))

    got, seen = jax.grad(loss, (0, 1))(w, eqlx.AdjointMonitor())
    expected = jax.grad(exact)(w.astype(jnp.float64))
    error = jnp.max(jnp.abs(got.astype(jnp.float64) - expected))
    return error / jnp.max(jnp.abs(expected)), seen.residual, seen.num_steps


def main():
    jax.config.update("jax_enable_x64", True)
    print(describe())
    print("| dtype | gain | beta | steps | undone | error | estimate |")
    print("|---|---|---|---|---|---|---|")
    cases = [(gain, beta) for gain in _GAINS for beta in _BETAS]
    gains, betas = jnp.array(cases).T
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        for num in _NUM_STEPS:
            row = lambda gain, beta: gradient_error(gain, beta, dtype, num)  # noqa: B023
            rows = jax.jit(jax.vmap(row))(gains, betas)
            for (gain, beta), error, estimate, undone in zip(cases, *rows, strict=True):
                print(
                    f"| {dtype.dtype.name} | {gain} | {beta} | {num} | {int(undone)} "
                    f"| {error:.0e} | {estimate:.0e} |"
                )


if __name__ == "__main__":
    main()
