import dataclasses
import functools as ft
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from equilax_kernels import affine_kernels, RowSolution, Status
from jaxtyping import Array, Float

from .._batching import Staged
from .._dtype import residual_dtype
from .._fused import AbstractFusedCell, AbstractFusedMap, FusedEnd
from .._norm import max_norm
from .._solution import RESULTS
from .._solver import (
    AbstractFixedPointSolver,
    Anderson,
    FixedPointIteration,
    iterate,
    Rejections,
)


_RESULTS = {
    Status.MAX_STEPS_REACHED: RESULTS.max_steps_reached,
    Status.NONFINITE: RESULTS.nonfinite,
    Status.DIVERGENCE: RESULTS.divergence,
    Status.STAGNATION: RESULTS.stagnation,
}


def _options(solver: AbstractFixedPointSolver) -> dict[str, Any] | None:
    """What the kernels call the solver, or `None` if they don't have it."""
    # Of a subclass nobody knows what it does.
    options: dict[str, Any]
    if type(solver) is FixedPointIteration:
        options = {}
    elif type(solver) is Anderson:
        names = ("history_length", "ridge", "safeguard")
        options = {name: getattr(solver, name) for name in names}
    else:
        return None
    if solver.norm is not max_norm or solver.axis_name is not None:
        return None
    return options | {"rtol": solver.rtol, "atol": solver.atol, "damp": solver.damp}


def _image(activation, z, args):
    weight, u, scale = args
    product = weight @ (z if scale is None else scale * z) + u
    return product if activation is None else activation(product)


class _RowByRow(NamedTuple):
    """The same by the loop of a layer, for where there can be no kernel."""

    activation: Callable[[Array], Array] | None
    history_length: int
    is_damped: bool
    max_steps: int

    def __call__(self, weight, u, z0, scale, knobs):
        return jax.vmap(ft.partial(self._one, weight, knobs))(u, z0, scale)

    def _one(self, weight, knobs, u, z0, scale):
        tolerances = (knobs.rtol, knobs.atol)
        damp = knobs.damp if self.is_damped else 0.0
        solver = FixedPointIteration(*tolerances, damp=damp)
        if self.history_length > 0:
            solver = Anderson(
                *tolerances,
                history_length=self.history_length,
                damp=damp,
                ridge=knobs.ridge,
                safeguard=knobs.safeguard,
            )
        end = iterate(
            ft.partial(_image, self.activation),
            solver,
            z0,
            (weight, u, scale),
            max_steps=self.max_steps,
            run=Staged().solve,
        )
        status = jnp.zeros((), jnp.int32)
        for code, item in _RESULTS.items():
            status = jnp.where(end.result == item, jnp.int32(int(code)), status)
        return end.y, end.num_steps, end.residual.astype(jnp.float32), status


def _kernels(
    solver: AbstractFixedPointSolver,
    y0: Float[Array, " d"],
    max_steps: int,
    weight: Float[Array, "d d"],
    u: Float[Array, " d"],
    scale: Float[Array, " d"] | None,
    activation: Callable[[Array], Array] | None,
) -> Mapping[str, Callable[[], FusedEnd]]:
    """Those for `solver`, for one row."""
    options = _options(solver)
    if options is None or len({x.dtype for x in (weight, u, y0)}) > 1:
        return {}
    if not jnp.issubdtype(y0.dtype, jnp.floating):
        return {}
    state = solver.init(y0, max_steps=max_steps)
    if isinstance(solver, Anderson):
        # Which the kernels have, but do not count.
        unknown = Rejections(*(jnp.array(-1, jnp.int32),) * 3)
        state = dataclasses.replace(state, rejections=unknown)
    damp = options["damp"]
    is_damped = not (isinstance(damp, (int, float)) and damp == 0)
    length = options.get("history_length", 0)
    otherwise = _RowByRow(activation, length, is_damped, max_steps)
    solves = affine_kernels(
        weight,
        u[None],
        y0[None],
        scale=None if scale is None else scale[None],
        activation=activation,
        max_steps=max_steps,
        otherwise=otherwise,
        **options,
    )
    dtype = residual_dtype(y0)
    return {name: ft.partial(_end, run, state, dtype) for name, run in solves.items()}


class AffineMap(AbstractFusedCell):
    r"""The map $z \mapsto \mathrm{activation}(W z + u)$, the activation elementwise."""

    weight: Float[Array, "d d"]
    u: Float[Array, " d"]
    activation: Callable[[Array], Array]

    def kernels(self, solver, y0, max_steps):
        weight, u = self.weight, self.u
        return _kernels(solver, y0, max_steps, weight, u, None, self.activation)

    def transposed(self, y, vector):
        product = self.weight @ y + self.u
        one = jnp.ones_like(product)
        slope = jax.jvp(self.activation, (product,), (one,))[1]
        return _ScaledMap(self.weight.T, vector, slope)


AffineMap.__init__.__doc__ = """**Arguments:**

- `weight`: $W$.
- `u`: What is added to the product.
- `activation`: `jnp.tanh`, `jax.nn.relu`, `jax.nn.gelu`, `jax.nn.softplus` or
    `jax.nn.identity`. There are no kernels for any other.
"""


class _ScaledMap(AbstractFusedMap):
    r"""The map $z \mapsto W (s \odot z) + u$."""

    weight: Float[Array, "d d"]
    u: Float[Array, " d"]
    scale: Float[Array, " d"]

    def kernels(self, solver, y0, max_steps):
        weight, u, scale = self.weight, self.u, self.scale
        return _kernels(solver, y0, max_steps, weight, u, scale, None)


def _end(run: Callable[[], RowSolution], state: Any, dtype: Any) -> FusedEnd:
    """The only row."""
    value, num_steps, residual, status = (x[0] for x in run())
    result = RESULTS.successful
    for code, item in _RESULTS.items():
        result = RESULTS.where(status == int(code), item, result)
    return FusedEnd(value, result, num_steps, residual.astype(dtype), state)
