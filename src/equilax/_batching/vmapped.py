from typing import ClassVar

import equinox as eqx

from .base import AbstractBatching
from .loop import Carry, Inputs, Loop


class Vmapped(AbstractBatching):
    """Leave a vmapped solve to JAX's own rule for `while_loop`.

    Every sample is evaluated until the slowest one has stopped, and the carry is copied
    once a step. This is for an `fn` with a collective over the vmapped axis name, such
    as `jax.lax.pmean(z, "batch")`, which the other strategies cannot serve. Samples
    that depend on each other in this way go on until the last of them has converged.
    """

    serves_axis_names: ClassVar[bool] = True

    found_names: frozenset[str] = eqx.field(static=True, default=frozenset())

    @property
    def axis_names(self) -> frozenset[str]:
        return self.found_names

    def solve(self, loop: Loop, inputs: Inputs) -> Carry:
        return loop.run(inputs, is_alone=False)


Vmapped.__init__.__doc__ = """**Arguments:**

- `found_names`: The names of the axes over which `fn` has collectives. They are found
    by themselves.
"""
