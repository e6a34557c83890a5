from typing import ClassVar

from .base import AbstractBatching
from .batch import solve_batch
from .loop import Carry, Inputs, Loop


class Lockstep(AbstractBatching):
    """One loop over the whole batch, in which finished samples are frozen.

    Every sample is evaluated until the slowest one has stopped. Compiles to one loop;
    costs as many evaluations of `fn` on the whole batch as the slowest sample needs.
    """

    serves_axis_names: ClassVar[bool] = False

    @property
    def axis_names(self) -> frozenset[str]:
        return frozenset()

    def solve(self, loop: Loop, inputs: Inputs) -> Carry:
        return solve_batch(loop, inputs, lambda size: (size,))
