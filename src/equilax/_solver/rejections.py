import equinox as eqx
import jax.numpy as jnp

from .._custom_types import BoolScalar, IntScalar
from .base import Evaluation


class Rejections(eqx.Module):
    """How often a solver did not trust its history, by cause.

    **Attributes:**

    - `safeguard`: The residual grew too much; the step was taken back.
    - `nonfinite`: `fn` was infinite or not a number; the step was taken back.
    - `degenerate`: The weights were beyond use; the history was begun anew.
    """

    safeguard: IntScalar
    nonfinite: IntScalar
    degenerate: IntScalar

    @classmethod
    def none(cls) -> "Rejections":
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, zero, zero)

    def after(
        self, at: Evaluation, is_rejected: BoolScalar, is_degenerate: BoolScalar
    ) -> "Rejections":
        """These and those of a step from `at`."""
        count = lambda cause: (cause & at.proceed).astype(jnp.int32)
        return Rejections(
            self.safeguard + count(is_rejected & at.is_finite),
            self.nonfinite + count(is_rejected & ~at.is_finite),
            self.degenerate + count(is_degenerate),
        )
