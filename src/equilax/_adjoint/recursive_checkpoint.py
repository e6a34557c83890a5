import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp

from .._check import check_integer
from .._mesh import any_varying, manual_axes
from .base import AbstractAdjoint
from .nested_scan import nested_scan


class RecursiveCheckpointAdjoint(AbstractAdjoint):
    r"""Backpropagate through the iterations, with recursive checkpointing.

    The derivative is that of the steps that were taken, the dependence on `y0` and the
    error of a solve cut short included: `n` steps of $y \leftarrow a y + b$ have the
    derivative $a^n$ in `y0`. A solve in which nothing moves any more takes no further
    steps, and has no derivative through them. Checkpoints as in Stumm and Walther
    (2010) keep the memory at $O(\log n)$ times `y` for $O(n \log n)$ evaluations.

    Use it to train through a few steps on purpose, or to check an implicit gradient.
    [`equilax.ImplicitAdjoint`][] costs less and is exact at a solution. Reverse mode of
    first order only. Inside `jax.shard_map` `checkpoints` has no say, and a solve takes
    the time and the memory of `max_steps` steps, whenever it ends.
    """

    checkpoints: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.checkpoints is not None:
            check_integer("checkpoints", self.checkpoints, 1)

    def apply(self, solve, problem):
        if problem.monitor is not None:
            raise ValueError(
                "`adjoint=RecursiveCheckpointAdjoint()` has no linear solve of which a "
                "`monitor` could tell; take `equilax.ImplicitAdjoint`, or no `monitor`."
            )

        def run(loop, inputs):
            def cond(carry):
                return loop.is_live(carry[1])

            def body(carry):
                num_steps, now = carry
                return num_steps + 1, loop.body(num_steps, now, inputs)

            init = (jnp.zeros((), jnp.int32), loop.init(inputs))
            max_steps = problem.max_steps + 1
            if manual_axes():  # Where the loops of Equinox do not work.
                axes = any_varying(inputs)
                scan = nested_scan(cond, body, init, max_steps=max_steps, may_vary=axes)
                return scan[1]
            return eqxi.while_loop(
                cond,
                body,
                init,
                max_steps=max_steps,
                kind="checkpointed",
                checkpoints=self.checkpoints,
            )[1]

        return solve(problem, run)


RecursiveCheckpointAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: The number of iterates to keep. `None` chooses it from `max_steps`.
"""
