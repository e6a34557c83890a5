import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .._dispatch import check_implementation, dispatch, Implementation, Kernel
from . import tpu, triton
from .activations import Activation
from .folding import fold_batches, without_derivative
from .reference import affine_fixed_point as _reference
from .rules import Knobs, Settings, Status as Status
from .support import resolved


class RowSolution(NamedTuple):
    """The solutions of many rows.

    **Attributes:**

    - `value`: The fixed points. Of a row that failed the best iterate, or the last
        finite one.
    - `num_steps`: The updates of each row.
    - `residual`: The maximum norm of $f(z) - z$ at `value`, infinite if not finite.
    - `status`: How each row ended, a `Status`.
    """

    value: Float[Array, "rows d"]
    num_steps: Int[Array, " rows"]
    residual: Float[Array, " rows"]
    status: Int[Array, " rows"]


_NO_DERIVATIVE = (
    "`affine_fixed_point` has no derivative of its own. That of a fixed point is a "
    "linear solve: call it inside a rule that does one, as `equilax.fixed_point` does, "
    "and stop the gradient of what goes in."
)


def _check(weight, u, z0, scale, max_steps: int, history_length: int) -> None:
    shapes = [x.shape for x in (weight, u, z0)] + (
        [] if scale is None else [scale.shape]
    )
    if u.ndim != 2 or weight.shape != (u.shape[1],) * 2 or set(shapes[1:]) != {u.shape}:
        raise ValueError(
            "`weight` must have the shape (d, d), and `u`, `z0` and `scale` (rows, d); "
            f"got {', '.join(map(str, shapes))}."
        )
    dtypes = {str(x.dtype) for x in (weight, u, z0)} | (
        set() if scale is None else {str(scale.dtype)}
    )
    if len(dtypes) > 1 or not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(
            "`weight`, `u`, `z0` and `scale` must have one real floating-point dtype; "
            f"got {', '.join(sorted(dtypes))}."
        )
    if max_steps < 0 or history_length < 0:
        raise ValueError(
            "`max_steps` and `history_length` must not be negative; got "
            f"{max_steps} and {history_length}."
        )


def _solve(settings: Settings, implementation: Implementation | None):
    reference = ft.partial(_reference, settings=settings)

    def run(weight, u, z0, scale, knobs):
        kernels = {
            "tpu": Kernel(
                ft.partial(tpu.affine_fixed_point, settings=settings),
                tpu.unsupported(weight, u, scale, settings),
            ),
            "triton": Kernel(
                ft.partial(triton.affine_fixed_point, settings=settings),
                triton.unsupported(weight, u, scale, settings),
            ),
        }
        return dispatch(
            weight,
            u,
            z0,
            scale,
            knobs,
            reference=reference,
            kernels=kernels,
            implementation=implementation,
        )

    def run_each(*arrays):
        if implementation in ("tpu", "triton"):
            raise ValueError(
                f"`implementation={implementation!r}` does not take a batch of "
                "`weight` or of tolerances: under `vmap` only rows may differ."
            )
        return jax.vmap(reference)(*arrays)

    return without_derivative(fold_batches(run, run_each), _NO_DERIVATIVE)


def affine_fixed_point(
    weight: Float[Array, "d d"],
    u: Float[Array, "rows d"],
    z0: Float[Array, "rows d"],
    *,
    activation: Activation,
    rtol: Any,
    atol: Any,
    max_steps: int,
    damp: Any = 0.0,
    scale: Float[Array, "rows d"] | None = None,
    history_length: int = 0,
    ridge: Any = 1e-10,
    safeguard: Any = 2.0,
    precision: lax.Precision | None = None,
    implementation: Implementation | None = None,
) -> RowSolution:
    r"""Find the fixed point of an affine map and an activation, of each row by itself:

    $z = \mathrm{activation}(W (s \odot z) + u)$

    by the damped iteration $z \leftarrow (1 - d) f(z) + d z$, or by Anderson
    acceleration with a small history (Walker and Ni 2011), in one kernel from the first
    step to the last: a tile of rows stays on chip until each of its rows has ended. How
    a row is judged, and when it ends with which status, is as in `equilax.fixed_point`
    with the maximum norm: converged means
    $\max_i |f_i - z_i| / (\mathrm{atol} + \mathrm{rtol} |z_i|) < 1$ at the value
    returned. A row that has ended is frozen, and none can change another.

    The adjoint is the same solve: $v = J^T v + g$ with $J = \mathrm{diag}(s) W$ is that
    of `weight.T` for `u = g`, `scale = s` and no activation.

    **Arguments:**

    - `weight`: $W$, common to all rows.
    - `u`: What is added to the product, and with it the right-hand side of the adjoint.
    - `z0`: The start of each row.
    - `activation`: `jnp.tanh`, `jax.nn.relu`, `jax.nn.gelu`, `jax.nn.softplus` or
        `None`, which leaves the product as it is. For any other elementwise function
        there is the reference alone. Keyword only argument, as are the others.
    - `rtol`, `atol`: The tolerances. With both zero the steps are a number to be taken.
    - `max_steps`: The most steps of a row.
    - `damp`: The damping $d$, in [0, 1).
    - `scale`: $s$, or `None` for ones.
    - `history_length`: The differences that Anderson acceleration keeps; zero is the
        damped iteration.
    - `ridge`, `safeguard`: Those of `equilax.Anderson`.
    - `precision`: Of the products, as for `jnp.matmul`.
    - `implementation`: `"tpu"`, `"triton"` or `"reference"` insists on one, and is an
        error where it does not take these arrays. `None` takes the kernel of the
        platform where it does, and the reference elsewhere.

    **Returns:**

    A `RowSolution`. Under `vmap` the rows of all samples are solved as one batch; with
    a batch of weights by the reference. It has no derivative.

    Cost: a row of `n` steps takes `(n + 1) * d * d` multiplications, and waits for the
    slowest of its tile: 128 rows on TPU, 8 to 64 on a GPU. Bytes: `u`, `z0` and `scale`
    are read once and `value` is written once, with 32 bytes of figures a row on TPU and
    12 on a GPU. The weights are read once a solve on TPU and once a tile on a GPU. A
    step moves nothing, where in XLA's loop it is 8 (TPU v5e) or 10 (H100) times the
    state, and with a history of 5 it is 32 or 41. But on a GPU the history is in
    memory: a step reads it once and writes two rows, 12 times the state, close by in
    the cache.

    Kernels take float32 and bfloat16, added up in float32; histories of up to 5; and on
    a GPU up to 128 features, without a history in bfloat16 up to 256. On TPU all must
    fit into VMEM: 1024 features in float32 do.
    """
    weight, u, z0 = map(jnp.asarray, (weight, u, z0))
    scale = None if scale is None else jnp.asarray(scale)
    check_implementation(implementation)
    _check(weight, u, z0, scale, max_steps, history_length)
    wide = u.dtype if jnp.finfo(u.dtype).bits > 32 else jnp.dtype(jnp.float32)
    knobs = (jnp.asarray(x, wide) for x in (rtol, atol, damp, ridge, safeguard))
    is_damped = not (isinstance(damp, (int, float)) and damp == 0)
    settings = Settings(
        activation, max_steps, history_length, is_damped, resolved(precision)
    )
    solve = _solve(settings, implementation)
    return RowSolution(*solve(weight, u, z0, scale, Knobs(*knobs)))
