from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._adjoint import AbstractAdjoint, AdjointMonitor, ImplicitAdjoint
from .._batching import AbstractBatching, Staged
from .._check import check_integer, check_key, check_number, check_positive
from .._custom_types import RealScalarLike
from .._dtype import at_least_single
from .._solution import Solution
from .._solver import AbstractFixedPointSolver
from .initial import parameter_dtype
from .monotone_map import DenseMap
from .monotone_solve import MonotoneSolve
from .sample import check_shape
from .splitting import AbstractSplitting


class LipschitzBoundedLayer(eqx.Module):
    r"""An equilibrium layer with a Lipschitz constant of at most `gamma`.

    $y = W_o z + b_o$ with $z = \sigma(W z + U x + b)$, for any parameters: with
    $\Lambda = \mathrm{diag}(e^\ell)$, the `margin` $m$ and any $\ell$, $V$ and $S$,

    $W = (1 - m) I - \Lambda^{-1} \left(\frac{W_o^T W_o}{2 \gamma} + \frac{\Lambda U U^T
    \Lambda}{2 \gamma} + V^T V + S - S^T \right),$

    so that $2 \Lambda - \Lambda W - W^T \Lambda - \frac{1}{\gamma} W_o^T W_o -
    \frac{1}{\gamma} \Lambda U U^T \Lambda = 2 m \Lambda + 2 V^T V$ is positive definite
    (Revay, Wang and Manchester 2020, theorem 2). Then $\|y_1 - y_2\|_2 \leq \gamma
    \|x_1 - x_2\|_2$ for any activation with a slope in [0, 1]. $I - W$ is monotone in
    the inner product of $\Lambda$, and both splittings converge as they do for
    [`equilax.nn.MonotoneLayer`][].

    The bound is that of exact solutions; a solve adds the error of its tolerance.

    Cost: `W` takes `features**2 * (2 * features + in_features + out_features)`
    multiplications once a solve; a step is that of the splitting.
    """

    output: Float[Array, "out_features features"]
    output_bias: Float[Array, " out_features"]
    injection: Float[Array, "features in_features"]
    bias: Float[Array, " features"]
    log_metric: Float[Array, " features"]
    v: Float[Array, "features features"]
    s: Float[Array, "features features"]
    how: MonotoneSolve
    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    gamma: float = eqx.field(static=True)
    margin: float = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        features: int,
        out_features: int,
        gamma: RealScalarLike,
        splitting: AbstractSplitting,
        solver: AbstractFixedPointSolver,
        *,
        margin: RealScalarLike = 0.1,
        activation: Callable[[Array], Array] = jax.nn.relu,
        adjoint: AbstractAdjoint = ImplicitAdjoint(),  # noqa: B008
        batching: AbstractBatching = Staged(),  # noqa: B008
        max_steps: int = 256,
        throw: bool = False,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_features`: The size of the input `x`.
        - `features`: The size of the state `z`.
        - `out_features`: The size of the output.
        - `gamma`: The bound on the Lipschitz constant in the two-norm, positive.
        - `splitting`: An [`equilax.nn.PeacemanRachford`][] or
            [`equilax.nn.ForwardBackward`][].
        - `solver`: A fixed-point solver, for the iterates of the splitting.
        - `margin`: The modulus `m` of monotonicity, positive. Keyword only argument.
        - `activation`: Elementwise, with a slope in [0, 1]. Keyword only argument.
        - `adjoint`: How to differentiate the solve. Keyword only argument.
        - `batching`: How the solve runs under `jax.vmap`. Keyword only argument.
        - `max_steps`: The most steps to take. Keyword only argument.
        - `throw`: Whether a failed solve raises. Keyword only argument.
        - `dtype`: The dtype of the parameters. Defaults to JAX's float. Keyword only
            argument.
        - `key`: A PRNG key for the initial parameters. Keyword only argument.
        """
        sizes = {
            "in_features": in_features,
            "features": features,
            "out_features": out_features,
        }
        for name, size in sizes.items():
            check_integer(name, size, 1)
        for name, value in (("gamma", gamma), ("margin", margin)):
            check_number(name, value)
            check_positive(name, value)
        self.how = MonotoneSolve(
            splitting, solver, activation, adjoint, batching, max_steps, throw
        )
        self.how.check()
        check_key("key", key)
        dtype = parameter_dtype(dtype)

        def normal(key, rows, columns, scale):
            scale = jnp.asarray(scale / columns**0.5, dtype)
            return scale * jr.normal(key, (rows, columns), dtype)

        keys = jr.split(key, 4)
        # What the bound takes from W is then of order one, whatever the bound.
        scale = min(1.0, gamma**0.5)
        self.output = normal(keys[0], out_features, features, scale)
        self.injection = normal(keys[1], features, in_features, scale)
        self.v = normal(keys[2], features, features, 0.5)
        self.s = normal(keys[3], features, features, 0.5)
        self.output_bias = jnp.zeros((out_features,), dtype)
        self.bias = jnp.zeros((features,), dtype)
        self.log_metric = jnp.zeros((features,), dtype)
        self.in_features = in_features
        self.features = features
        self.out_features = out_features
        self.gamma = float(gamma)
        self.margin = float(margin)

    def _map(self) -> DenseMap:
        # Half precision would break the bound by its rounding.
        dtype = at_least_single(self.v.dtype)
        metric, output, injection, v, s = (
            x.astype(dtype)
            for x in (self.log_metric, self.output, self.injection, self.v, self.s)
        )
        # Of `Lambda**-0.5 (...) Lambda**-0.5`, in which no exponential overflows early.
        root = jnp.exp(metric / 2)
        scaled = lambda x: x / root[None, :]
        output, v = scaled(output), scaled(v)
        injection = root[:, None] * injection
        share = (output.T @ output + injection @ injection.T) / (2 * self.gamma)
        skew = scaled((s - s.T) / root[:, None])
        inner = (1 - self.margin) * jnp.eye(self.features, dtype=dtype)
        inner = inner - (share + v.T @ v + skew)
        weight = inner * root[None, :] / root[:, None]
        return DenseMap(weight=weight, margin=self.margin, metric=root)

    def matrix(self) -> Float[Array, "features features"]:
        """The matrix `W`."""
        return self._map().weight

    def __call__(
        self,
        x: Float[Array, " in_features"],
        *,
        z0: Float[Array, " features"] | None = None,
        key: Any = None,
        monitor: AdjointMonitor | None = None,
    ) -> Float[Array, " out_features"]:
        """**Arguments:**

        - `x`: The input, one sample.
        - `z0`: A guess of the equilibrium. Defaults to zero. Keyword only argument.
        - `key`: Ignored; provided for compatibility with `equinox.nn.Sequential`.
            Keyword only argument.
        - `monitor`: An [`equilax.AdjointMonitor`][], whose gradient tells how the
            backward pass went. Keyword only argument.

        **Returns:**

        The output.
        """
        del key
        z = self.solve(x, z0=z0, monitor=monitor).value
        return self.output @ z + self.output_bias

    def solve(
        self,
        x: Float[Array, " in_features"],
        *,
        z0: Float[Array, " features"] | None = None,
        state: PyTree[Any] = None,
        monitor: AdjointMonitor | None = None,
    ) -> Solution:
        """The [`equilax.Solution`][] of the equilibrium `z` that the output is made of.

        **Arguments:**

        - `x`, `z0`, `monitor`: As for calling the layer.
        - `state`: The `Solution.state` of an earlier solve. Keyword only argument.
        """
        return self.how(self._map(), self._drive(x), z0, state, monitor)

    def solve_adjoint(
        self,
        x: Float[Array, " in_features"],
        z: Float[Array, " features"],
        cotangent: Float[Array, " features"],
        *,
        state: PyTree[Any] = None,
    ) -> Solution:
        """As `solve_adjoint` of an [`equilax.nn.MonotoneLayer`][].

        `z` is the equilibrium, and the cotangent is one of it: the transpose of
        `output` times one of the output.
        """
        u = self._drive(x)
        return self.how.solve_adjoint(self._map(), u, z, cotangent, state)

    def _drive(self, x):
        check_shape("x", x, (self.in_features,))
        return self.injection @ x + self.bias
