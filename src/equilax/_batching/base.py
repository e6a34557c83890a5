import abc

import equinox as eqx
from equinox import AbstractClassVar

from .loop import Carry, Inputs, Loop


class AbstractBatching(eqx.Module):
    """Abstract base class for how a solve runs under `jax.vmap`.

    **Attributes:**

    - `serves_axis_names`: Whether `fn` may use collectives over the name of an axis
        that is vmapped.
    """

    serves_axis_names: AbstractClassVar[bool]

    @property
    @abc.abstractmethod
    def axis_names(self) -> frozenset[str]:
        """The vmapped axes over which `fn` has collectives.

        Samples along these depend on each other, and so end together.
        """

    @abc.abstractmethod
    def solve(self, loop: Loop, inputs: Inputs) -> Carry:
        """Run `loop` on `inputs`, such that `jax.vmap` of this call runs the batch.

        **Arguments:**

        - `loop`: The loop for one problem, in pure functions.
        - `inputs`: A pytree of arrays, all that `loop` depends on.

        **Returns:**

        The carry in which each problem was left.
        """
