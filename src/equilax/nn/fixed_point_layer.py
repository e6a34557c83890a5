import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._adjoint import (
    AbstractAdjoint,
    AbstractImplicitAdjoint,
    AdjointMonitor,
    ImplicitAdjoint,
)
from .._batching import AbstractBatching, Staged
from .._check import check_callable, check_instance, check_integer
from .._fixed_point import solve
from .._fused import AbstractFusedCell
from .._settings import Settings
from .._solution import Solution
from .._solve_adjoint import adjoint_by
from .._solver import AbstractFixedPointSolver
from .parametrisation import prepare
from .start import start


def _call(z, args):
    cell, x, key = args
    return cell(z, x) if key is None else cell(z, x, key=key)


def _fuse(args) -> AbstractFusedCell | None:
    cell, x, _ = args
    fused = getattr(cell, "fused", None)
    return None if fused is None else fused(x)


def _takes_key(cell: Callable) -> bool:
    try:
        parameters = inspect.signature(cell).parameters.values()
    except ValueError:  # A builtin has none.
        return False
    return any(p.name == "key" or p.kind is p.VAR_KEYWORD for p in parameters)


class FixedPointLayer(eqx.Module):
    r"""A deep equilibrium layer: the `z` for which `cell(z, x) == z` (Bai et al. 2019).

    An Equinox layer like any other: one sample in, one out. `jax.vmap(layer)(xs)` runs
    the samples of a batch as one solve that holds up no quick sample for a slow one.
    Gradients reach the parameters of the cell and `x` by the implicit function theorem.

    A solve that does not converge does not raise here: its value is where it stopped.
    Call `solve` in place of the layer to read its status and its step count.

    What a cell makes of its parameters, such as a normalised weight, is made once a
    solve: see [`equilax.nn.prepare`][].

    Cost: an evaluation of the cell a step of the solver and one more; the same again in
    the backward pass, with products in place of evaluations. Memory: the solver's in
    the forward pass, one linearisation of the cell in the backward pass.
    """

    cell: Callable
    solver: AbstractFixedPointSolver
    adjoint: AbstractAdjoint
    batching: AbstractBatching
    max_steps: int = eqx.field(static=True)
    throw: bool = eqx.field(static=True)
    fuse: bool = eqx.field(static=True)

    def __init__(
        self,
        cell: Callable,
        solver: AbstractFixedPointSolver,
        *,
        adjoint: AbstractAdjoint = ImplicitAdjoint(),  # noqa: B008
        batching: AbstractBatching = Staged(),  # noqa: B008
        max_steps: int = 256,
        throw: bool = False,
        fuse: bool = True,
    ):
        """**Arguments:**

        - `cell`: Maps `(z, x)` to a tree like `z`. Any callable, in general an Equinox
            module. Three things are optional: a method `init(x) -> z0` that shapes the
            state, a keyword argument `key` for randomness, and a method `fused(x)` that
            returns an [`equilax.nn.AbstractFusedCell`][], the map in a form that has
            kernels.
        - `solver`: A fixed-point solver, such as [`equilax.Anderson`][].
        - `adjoint`: How to differentiate the solve. The `args` of its `preconditioner`
            are `(cell, x, key)`. Keyword only argument.
        - `batching`: How the solve runs under `jax.vmap`. Keyword only argument.
        - `max_steps`: The most steps to take. Keyword only argument.
        - `throw`: Whether a failed solve raises. Keyword only argument.
        - `fuse`: Whether a device that has a kernel for the whole solve of this cell by
            this solver takes it. Keyword only argument.
        """
        check_callable("cell", cell, "cell(z, x)")
        check_instance("solver", solver, AbstractFixedPointSolver)
        check_instance("adjoint", adjoint, AbstractAdjoint)
        check_instance("batching", batching, AbstractBatching)
        check_instance("throw", throw, bool)
        check_instance("fuse", fuse, bool)
        check_integer("max_steps", max_steps, 1)
        self.cell = cell
        self.solver = solver
        self.adjoint = adjoint
        self.batching = batching
        self.max_steps = max_steps
        self.throw = throw
        self.fuse = fuse

    def __call__(
        self,
        x: PyTree[Any],
        *,
        z0: PyTree[Array] | None = None,
        key: PRNGKeyArray | None = None,
        monitor: AdjointMonitor | None = None,
    ) -> PyTree[Array]:
        """**Arguments:**

        - `x`: The injected input, one sample.
        - `z0`: The initial guess. Defaults to `cell.init(x)`, and for a cell without
            one to zeros like `x`. Keyword only argument.
        - `key`: A PRNG key, handed to a cell that takes one: the same in every
            evaluation of the solve, without which there is no fixed point. Keyword only
            argument.
        - `monitor`: An [`equilax.AdjointMonitor`][], whose gradient tells how the
            backward pass went. Keyword only argument.

        **Returns:**

        The equilibrium, of the structure, shapes and dtypes of `z0`.
        """
        return self.solve(x, z0=z0, key=key, monitor=monitor).value

    def solve(
        self,
        x: PyTree[Any],
        *,
        z0: PyTree[Array] | None = None,
        key: PRNGKeyArray | None = None,
        state: PyTree[Any] = None,
        monitor: AdjointMonitor | None = None,
    ) -> Solution:
        """As calling the layer, but returns the whole [`equilax.Solution`][].

        **Arguments:**

        - `x`, `z0`, `key`, `monitor`: As for calling the layer.
        - `state`: The `Solution.state` of an earlier solve, to go on with what it
            learnt of the cell: with its `value` as `z0`, from frame to frame, say.
            Keyword only argument.
        """
        return solve(*self.problem(x, z0=z0, key=key), self._settings(state, monitor))

    def problem(
        self,
        x: PyTree[Any],
        *,
        z0: PyTree[Array] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Callable, PyTree[Array], PyTree[Any]]:
        """The problem that the layer solves, for a function that wants it bare.

        As in `fn, z0, args = layer.problem(x)`, then
        `equilax.jacobian_penalty(fn, layer(x), args, key=key)`.

        **Arguments:**

        - `x`, `z0`, `key`: As for calling the layer.

        **Returns:**

        The function, the initial guess and the `args` of [`equilax.fixed_point`][].
        """
        args = self._args(x, key)
        return _call, start(_call, z0, args), args

    def solve_adjoint(
        self,
        x: PyTree[Any],
        z: PyTree[Array],
        cotangent: PyTree[Array],
        *,
        key: PRNGKeyArray | None = None,
        state: PyTree[Any] = None,
    ) -> Solution:
        """Do the linear solve of the backward pass, as [`equilax.solve_adjoint`][].

        **Arguments:**

        - `x`, `key`: As for calling the layer.
        - `z`: The equilibrium.
        - `cotangent`: The derivative of a loss in `z`.
        - `state`: The `Solution.state` of the forward pass, for an adjoint that shares
            it. Keyword only argument.

        **Returns:**

        An [`equilax.Solution`][], with the status, steps and residual of the solve.
        """
        if not isinstance(self.adjoint, AbstractImplicitAdjoint):
            raise TypeError(
                f"`adjoint={type(self.adjoint).__name__}` has no linear solve in its "
                "backward pass."
            )
        settings = self._settings(state, None)
        return adjoint_by(_call, z, cotangent, self._args(x, key), None, settings)

    def _args(self, x, key) -> tuple[Callable, Any, Any]:
        cell = prepare(self.cell)
        return cell, x, key if _takes_key(cell) else None

    def _settings(self, state, monitor) -> Settings:
        return Settings(
            self.solver,
            self.max_steps,
            self.adjoint,
            self.batching,
            self.throw,
            state,
            monitor,
            fuse=_fuse if self.fuse else None,
        )
