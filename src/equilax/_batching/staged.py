from typing import ClassVar

import equinox as eqx

from .._check import check_integer
from .base import AbstractBatching
from .batch import solve_batch
from .loop import Carry, Inputs, Loop


class Staged(AbstractBatching):
    """A chain of loops over ever smaller batches: a slow sample holds up no quick one.

    Each loop runs until the samples that are still live fit into the next size; these
    are gathered to the front and go on alone. The sizes fall evenly from the batch size
    to `min_size`, by a ratio of at most `factor`. All shapes are static, and nothing
    leaves the device. Only inputs that are batched are gathered: parameters shared by
    the samples stay where they are.

    Costs the compilation of `fn` once a stage, so `Lockstep` is the better choice where
    all samples are known to take alike many steps and compile time matters.
    """

    serves_axis_names: ClassVar[bool] = False

    factor: int = eqx.field(static=True, default=8)
    min_size: int = eqx.field(static=True, default=4)

    def __check_init__(self):
        check_integer("factor", self.factor, 2)
        check_integer("min_size", self.min_size, 1)

    def sizes(self, size: int) -> tuple[int, ...]:
        """The static batch sizes of the chain for a batch of `size` samples."""
        num = 0
        while self.min_size * self.factor**num < size:
            num += 1
        if num == 0:
            return (size,)
        ratio = (self.min_size / size) ** (1 / num)
        return (size, *(round(size * ratio**i) for i in range(1, num + 1)))

    @property
    def axis_names(self) -> frozenset[str]:
        return frozenset()

    def solve(self, loop: Loop, inputs: Inputs) -> Carry:
        return solve_batch(loop, inputs, self.sizes)


Staged.__init__.__doc__ = """**Arguments:**

- `factor`: By how much a stage may be smaller than the one before it. An integer, 2 or
    more; larger ones compile faster, smaller ones waste fewer evaluations.
- `min_size`: The smallest batch to gather into, in samples.
"""
