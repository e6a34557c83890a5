from collections.abc import Callable
from typing import Any

from jax import lax
from jaxtyping import Array, Float

from .._dispatch import check_implementation, Implementation, on_platform
from .._lowered import Solve
from .activations import Activation
from .rules import Status as Status
from .solvers import able, prepared, RowSolution as RowSolution, solver_by


def affine_kernels(
    weight: Float[Array, "d d"],
    u: Float[Array, "rows d"],
    z0: Float[Array, "rows d"],
    *,
    otherwise: Solve | None = None,
    **options: Any,
) -> dict[str, Callable[[], RowSolution]]:
    """The kernels that [`affine_fixed_point`][] has for these arrays.

    For [`on_platform`][], and a solve of one's own in the place of the reference.

    **Arguments:**

    - `weight`, `u`, `z0`, `options`: As for [`affine_fixed_point`][], but for
        `implementation`.
    - `otherwise`: Called as `otherwise(weight, u, z0, scale, knobs)`, with scalars for
        the last, where a kernel turns out not to fit: for a batch of weights under
        `vmap`, in a program that is exported for CUDA, and in one that the compiler
        divides between several TPUs. Hashable, and captures no arrays. Returns the
        items of a `RowSolution`. Defaults to the reference. Keyword only argument.

    **Returns:**

    By implementation, a function of no arguments that solves.
    """
    return able(*prepared(weight, u, z0, **options), otherwise)


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
    - `activation`: `jnp.tanh`, `jax.nn.relu`, `jax.nn.gelu`, `jax.nn.softplus`, or
        `jax.nn.identity` or `None`, which leave the product as it is. For any other
        elementwise function there is the reference alone. Keyword only argument, as are
        the others.
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
    check_implementation(implementation)
    arrays, settings = prepared(
        weight,
        u,
        z0,
        activation=activation,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        damp=damp,
        scale=scale,
        history_length=history_length,
        ridge=ridge,
        safeguard=safeguard,
        precision=precision,
    )
    if implementation is not None:
        return solver_by(implementation, settings, insists=True)(*arrays)
    solve = solver_by("reference", settings)
    return on_platform(lambda: solve(*arrays), able(arrays, settings))
