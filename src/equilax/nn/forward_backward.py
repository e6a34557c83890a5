from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._check import check_positive
from .._custom_types import RealScalarLike
from .monotone_map import AbstractMonotoneMap
from .proximal import proximal
from .splitting import AbstractSplit, AbstractSplitting, as_constant


class _Split(AbstractSplit):
    map: AbstractMonotoneMap
    activation: Callable[[Array], Array]
    alpha: RealScalarLike

    def start(self, z, u):
        del u
        return z

    def step(self, y, u):
        alpha = jnp.asarray(self.alpha, y.dtype)
        forward = y - alpha * (y - self.map.mv(y) - u)
        return proximal(self.activation, forward, self.alpha)

    def value(self, y):
        return y


class ForwardBackward(AbstractSplitting):
    r"""Forward-backward splitting of $z = \sigma(W z + u)$.

    $z_{k+1} = \mathrm{prox}_{\alpha f}(z_k - \alpha ((I - W) z_k - u))$ with
    $\mathrm{prox}_f = \sigma$ (Winston and Kolter 2020, section 3.2). With the margin
    $m$ and $L = \|I - W\|_2$ it converges for $\alpha < 2 m / L^2$, and contracts by
    $\sqrt{1 - 2 \alpha m + \alpha^2 L^2}$ or better.

    Use it where a factorisation is too large or too dear. In general
    [`equilax.nn.PeacemanRachford`][] takes a fraction of its steps.

    Cost: a product with $W$ a step, and with `alpha=None` five products of matrices
    once a solve of a whole batch.
    """

    alpha: RealScalarLike | None = None

    def __check_init__(self):
        if self.alpha is not None:
            check_positive("alpha", self.alpha)

    def split(self, map, activation):
        alpha = self.alpha
        if alpha is None:
            alpha = map.margin / lax.stop_gradient(map).norm() ** 2
        return _Split(map, activation, as_constant(alpha))


ForwardBackward.__init__.__doc__ = r"""**Arguments:**

- `alpha`: The length of a step. `None` is $m / L^2$, with a bound for $L$ that is at
    most a factor of `features**(1/64)` too large: for that length the bound
    on the contraction is least: $\sqrt{1 - m^2 / L^2}$.
"""
