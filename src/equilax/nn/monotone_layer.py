from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from .._adjoint import AbstractAdjoint, AdjointMonitor, ImplicitAdjoint
from .._batching import AbstractBatching, Staged
from .._check import check_callable, check_instance
from .._solution import Solution
from .._solver import AbstractFixedPointSolver
from .monotone_linear import AbstractMonotoneLinear
from .monotone_solve import MonotoneSolve
from .splitting import AbstractSplitting


class MonotoneLayer(eqx.Module):
    r"""A monotone operator equilibrium layer (Winston and Kolter 2020).

    The one $z$ for which $z = \sigma(W z + u)$, with $u$ the injection of the input:
    it exists and is unique for any parameters, and a splitting with
    [`equilax.FixedPointIteration`][] converges to it from any start. Other solvers
    accelerate the splitting and mostly do better, without such a promise.

    $W$ and what the splitting needs of it, such as a factorisation, are formed once for
    a solve, of a whole batch under `jax.vmap`, and serve the backward pass too.
    Gradients are those of the implicit function theorem, in which the linear system is
    that of the splitting: its fixed-point iteration is the splitting of the adjoint,
    with the same contraction factor.

    A solve that does not converge does not raise here: its value is where it stopped.

    Cost: a step of the splitting a step of the solver and one more; the same again in
    the backward pass, with the transposes. Memory: `W`, the factorisation, and what the
    solver takes.
    """

    linear: AbstractMonotoneLinear
    injection: Callable[..., Array]
    how: MonotoneSolve

    def __init__(
        self,
        linear: AbstractMonotoneLinear,
        injection: Callable[..., Array],
        splitting: AbstractSplitting,
        solver: AbstractFixedPointSolver,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        adjoint: AbstractAdjoint = ImplicitAdjoint(),  # noqa: B008
        batching: AbstractBatching = Staged(),  # noqa: B008
        max_steps: int = 256,
        throw: bool = False,
    ):
        """**Arguments:**

        - `linear`: An [`equilax.nn.MonotoneLinear`][] or [`equilax.nn.MonotoneConv`][].
        - `injection`: Maps the input to `u`, of the shape of the state, bias included.
            Any callable, in general an Equinox layer such as `equinox.nn.Linear`.
        - `splitting`: An [`equilax.nn.PeacemanRachford`][] or
            [`equilax.nn.ForwardBackward`][].
        - `solver`: A fixed-point solver, for the iterates of the splitting. These are
            what its tolerances refer to; for Peaceman-Rachford they are not `z`.
        - `activation`: Elementwise, with a slope in [0, 1]. ReLU takes no work beyond
            itself; others are evaluated twelve times a step, unless the `alpha` of the
            splitting is one. Keyword only argument.
        - `adjoint`: How to differentiate the solve. Keyword only argument.
        - `batching`: How the solve runs under `jax.vmap`. Keyword only argument.
        - `max_steps`: The most steps to take. Keyword only argument.
        - `throw`: Whether a failed solve raises. Keyword only argument.
        """
        check_instance("linear", linear, AbstractMonotoneLinear)
        check_callable("injection", injection, "injection(x)")
        how = MonotoneSolve(
            splitting, solver, activation, adjoint, batching, max_steps, throw
        )
        how.check()
        self.linear = linear
        self.injection = injection
        self.how = how

    def __call__(
        self,
        x: PyTree[Any],
        *,
        z0: Float[Array, "..."] | None = None,
        key: Any = None,
        monitor: AdjointMonitor | None = None,
    ) -> Float[Array, "..."]:
        """**Arguments:**

        - `x`: The input, one sample.
        - `z0`: A guess of the solution. Defaults to zero. Keyword only argument.
        - `key`: Ignored; provided for compatibility with `equinox.nn.Sequential`.
            Keyword only argument.
        - `monitor`: An [`equilax.AdjointMonitor`][], whose gradient tells how the
            backward pass went. Keyword only argument.

        **Returns:**

        The equilibrium, of the shape and dtype of `injection(x)`.
        """
        del key
        return self.solve(x, z0=z0, monitor=monitor).value

    def solve(
        self,
        x: PyTree[Any],
        *,
        z0: Float[Array, "..."] | None = None,
        state: PyTree[Any] = None,
        monitor: AdjointMonitor | None = None,
    ) -> Solution:
        """As calling the layer, but returns the whole [`equilax.Solution`][].

        Its `value` is the equilibrium; its `stats` are those of the iterates of the
        splitting.

        **Arguments:**

        - `x`, `z0`, `monitor`: As for calling the layer.
        - `state`: The `Solution.state` of an earlier solve. Keyword only argument.
        """
        u = self.injection(x)
        map = self.linear.prepare(u.shape)
        return self.how(map, u, z0, state, monitor)

    def solve_adjoint(
        self,
        x: PyTree[Any],
        z: Float[Array, "..."],
        cotangent: Float[Array, "..."],
        *,
        state: PyTree[Any] = None,
    ) -> Solution:
        """Do the linear solve of the backward pass, as [`equilax.solve_adjoint`][].

        **Arguments:**

        - `x`: The input, one sample.
        - `z`: The equilibrium.
        - `cotangent`: The derivative of a loss in `z`.
        - `state`: The `Solution.state` of the forward pass, for an adjoint that shares
            it. Keyword only argument.

        **Returns:**

        An [`equilax.Solution`][], with the status, steps and residual of the solve. Its
        value is a cotangent of the iterate of the splitting.
        """
        u = self.injection(x)
        return self.how.solve_adjoint(
            self.linear.prepare(u.shape), u, z, cotangent, state
        )
