from collections.abc import Callable

import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array

from .._check import check_instance, check_positive
from .._custom_types import RealScalarLike
from .monotone_map import Resolvent
from .proximal import proximal
from .splitting import AbstractSplit, AbstractSplitting, as_constant


class _Split(AbstractSplit):
    resolvent: Resolvent
    activation: Callable[[Array], Array]
    alpha: RealScalarLike

    def start(self, z, u):
        # At a solution z = prox(y) means y = z + alpha (W z + u - z).
        alpha = jnp.asarray(self.alpha, z.dtype)
        return z + alpha * (self.resolvent.map.mv(z) + u - z)

    def step(self, y, u):
        reflected = 2 * self.value(y) - y
        alpha = jnp.asarray(self.alpha, y.dtype)
        return 2 * self.resolvent(reflected + alpha * u) - reflected

    def value(self, y):
        return proximal(self.activation, y, self.alpha)


class PeacemanRachford(AbstractSplitting):
    r"""Peaceman-Rachford splitting of $z = \sigma(W z + u)$.

    With $z = \mathrm{prox}_{\alpha f}(y)$, $\mathrm{prox}_f = \sigma$, the reflection
    $r = 2 z - y$ and the resolvent $V = (I + \alpha (I - W))^{-1}$,

    $y_{k+1} = 2 V (r_k + \alpha u) - r_k$

    (Winston and Kolter 2020, section 3.2). It converges for every $\alpha > 0$, and
    with the margin $m$ and $L = \|I - W\|_2$ contracts by
    $\sqrt{1 - 4 \alpha m / (1 + \alpha L)^2}$ or better.

    $V$ is formed by one factorisation, ahead of the first step. The backward pass is
    the same splitting of the transposed system, by the same $V$: the Jacobian of a
    step, transposed, is $(2 D - I) (2 V^T - I)$ with $D$ that of the proximal operator.

    Cost: a product with $V$ a step; the factorisation, $2 n^3$ multiplications for $V$
    and with `alpha=None` five products of matrices, once a solve of a whole batch.
    """

    alpha: RealScalarLike | None = None
    linear_solver: lx.AbstractLinearSolver = lx.LU()

    def __check_init__(self):
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
        check_instance("linear_solver", self.linear_solver, lx.AbstractLinearSolver)

    def split(self, map, activation):
        alpha = self.alpha
        if alpha is None:
            alpha = 1 / lax.stop_gradient(map).norm()
        alpha = as_constant(alpha)
        resolvent = Resolvent(map, alpha, self.linear_solver)
        return _Split(resolvent, activation, alpha)


PeacemanRachford.__init__.__doc__ = r"""**Arguments:**

- `alpha`: The length of a step. `None` is $1 / L$, with a bound for $L$ that is at most
    a factor of `features**(1/64)` too large: for that length the bound
    on the contraction is least: $\sqrt{1 - m / L}$.
- `linear_solver`: The Lineax solver that forms $V$, whose `init` is called once. A
    direct one, such as [`lineax.LU`][].
"""
