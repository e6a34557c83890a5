import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._batching import while_loop
from .._check import check_fraction, check_integer
from .._custom_types import AxisName, RealScalarLike
from .._dtype import real
from .._mesh import any_varying
from .._misc import hoist, tree_allfinite
from .._norm import max_norm
from .._solution import RESULTS, Solution
from .base import AbstractMatrixFreeSolver


def _outcome(axis_name: AxisName, u: PyTree[Array]) -> RESULTS:
    is_finite = tree_allfinite(u, axis_name)
    return RESULTS.where(is_finite, RESULTS.successful, RESULTS.nonfinite)


class Neumann(AbstractMatrixFreeSolver):
    r"""A truncated Neumann series: cheap, inexact gradients.

    For $A = I - J^T$ and `num_terms` $= k$, `damp` $= d$,

    $u = (1 - d) \sum_{j=0}^{k} \left( d I + (1 - d) J^T \right)^j v.$

    - `Neumann(0)` is the one-step or Jacobian-free gradient, $u = v$ (Fung et al. 2022,
      equation 5; Bolte, Pauwels and Vaiter 2023).
    - `Neumann(k)` is what backpropagation through `k + 1` steps of the iteration from
      the solution gives.
    - With a `damp` it is the phantom gradient of `k + 1` damped steps (Geng et al.
      2021, equation 12); they take a `damp` of 0.3 to 0.5.

    The relative error falls as $\|d I + (1 - d) J\|^{k+1}$: small for a contraction,
    large close to one. Use it to train fast and roughly; check the gradient against
    [`equilax.FixedPointLinearSolver`][] before you trust it. It is
    `successful` once the terms asked for have been summed to something finite;
    `residual` in `stats` tells what is missing.

    Cost: `num_terms` products with $A$, and one for the residual. Memory: twice `v`.
    """

    num_terms: int = eqx.field(static=True)
    damp: RealScalarLike = 0.0

    def __check_init__(self):
        check_integer("num_terms", self.num_terms, 0)
        check_fraction("damp", self.damp)

    @property
    def norm(self):
        return max_norm

    def solve(self, mv, vector, terms):
        mv = hoist(mv, vector)

        def weigh(x):
            weight = 1 - jnp.asarray(self.damp, real(x.dtype))
            return x * weight.astype(x.dtype)

        # For the partial sums, u_{k+1} = (1 - d) v + (d I + (1 - d) J) u_k, which is
        # u_k + (1 - d) (v - A u_k).
        def body(carry):
            k, u = carry
            step = jtu.tree_map(lambda b, c: weigh(b - c), vector, mv(u))
            return k + 1, jtu.tree_map(jnp.add, u, step)

        init = (jnp.zeros((), jnp.int32), jtu.tree_map(weigh, vector))
        _, u = while_loop(
            lambda carry: carry[0] < self.num_terms,
            body,
            init,
            may_vary=any_varying(mv, vector),
        )
        # Gone from the compiled program where nobody asks for it.
        left = jtu.tree_map(jnp.subtract, vector, mv(u))
        residual = terms.size(max_norm, left)
        num = jnp.zeros(residual.shape, jnp.int32) + jnp.int32(self.num_terms)
        stats = {
            "num_steps": num,
            "num_fn_evals": num + 1,
            "max_steps": self.num_terms,
            "residual": lax.stop_gradient(residual),
        }
        result = terms.each(ft.partial(_outcome, terms.axis_name))(u)
        return Solution(u, result, None, stats, None)


Neumann.__init__.__doc__ = """**Arguments:**

- `num_terms`: The highest power of the Jacobian in the sum, at least 0.
- `damp`: The damping, in [0, 1). Zero is the plain series.
"""
