from typing import ClassVar

from .base import AbstractBatching
from .loop import Carry, Inputs, Loop


class Vmapped(AbstractBatching):
    """Leave a vmapped solve to JAX's own rule for `while_loop`.

    Every sample is evaluated until the slowest one has stopped, and the carry is copied
    once a step. This is for an `fn` with a collective over the vmapped axis name, such
    as `jax.lax.pmean(z, "batch")`, which the other strategies cannot serve.
    """

    serves_axis_names: ClassVar[bool] = True

    def solve(self, loop: Loop, inputs: Inputs) -> Carry:
        return loop.run(inputs)
