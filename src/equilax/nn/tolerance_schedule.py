import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Scalar

from .._check import check_integer, check_number, check_positive
from .._custom_types import IntScalar


class ToleranceSchedule(eqx.Module):
    r"""A tolerance that falls, or rises, geometrically in the course of training.

    $\mathrm{first}^{1 - t}\, \mathrm{last}^t$ with $t = k / n$ up to one, for step `k`
    of the `n` `num_steps`. Early in training a rough gradient will do, and a loose
    tolerance saves steps.

    The tolerances of a solver may be traced, so that a change of them compiles nothing
    anew: put them in place inside of the compiled function, as in
    `dataclasses.replace(solver, rtol=schedule(step))`.
    """

    first: float = eqx.field(static=True)
    last: float = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __check_init__(self):
        for name, value in (("first", self.first), ("last", self.last)):
            check_number(name, value)
            check_positive(name, value)
        check_integer("num_steps", self.num_steps, 1)

    def __call__(self, step: IntScalar | int) -> Scalar:
        """**Arguments:**

        - `step`: The number of the step of training, from zero. May be traced.

        **Returns:**

        The tolerance, in JAX's float.
        """
        dtype = jnp.zeros((), float).dtype
        time = jnp.clip(jnp.asarray(step, dtype) / self.num_steps, 0, 1)
        return self.first ** (1 - time) * self.last**time


ToleranceSchedule.__init__.__doc__ = """**Arguments:**

- `first`: The tolerance at step zero, positive.
- `last`: That from step `num_steps` on, positive.
- `num_steps`: The steps from one to the other, at least 1.
"""
