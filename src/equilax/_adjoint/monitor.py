from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def _zero() -> Float[Array, ""]:
    return jnp.zeros((), jnp.float32)


class AdjointMonitor(eqx.Module):
    """What the backward pass has to say, as the gradient of an argument.

    Hand one to [`equilax.fixed_point`][] or to a layer, and differentiate with respect
    to it: the solve does not depend on it, and what comes out as its "gradient" are the
    figures below. No callback is needed, so it works compiled, exported and in
    `shard_map`, and costs next to nothing. As a gradient does, it sums over all solves
    that share it, `jax.vmap` included; one that is vmapped has the figures of each
    sample.

    !!! example

        ```python
        def loss(model, monitor, x):
            return jnp.sum(model(x, monitor=monitor) ** 2)

        grads, seen = jax.grad(loss, (0, 1))(model, equilax.AdjointMonitor(), x)
        seen.num_steps / seen.num_solves
        ```

    Forward mode takes no notice of it. Cost: the sums; a product with the Jacobian more
    with a `solution`, and for a linear solver that has no residual at hand, as
    [`equilax.Neumann`][] and those of Lineax.
    """

    num_solves: Float[Array, ""] = eqx.field(default_factory=_zero)
    num_steps: Float[Array, ""] = eqx.field(default_factory=_zero)
    num_failed: Float[Array, ""] = eqx.field(default_factory=_zero)
    residual: Float[Array, ""] = eqx.field(default_factory=_zero)
    solution: PyTree[Any] = None


AdjointMonitor.__init__.__doc__ = """**Arguments:**

What is handed in counts for `solution` alone; the figures are there to be read from the
gradient.

- `num_solves`: The linear solves of the backward pass.
- `num_steps`: Their steps.
- `num_failed`: How many of them failed.
- `residual`: The sum of their residuals, each relative to its right-hand side. Those
    that are not finite are left out; they have failed.
- `solution`: `None`, or the solution of the linear solve, a tree like `y`. What is
    handed in is where the solve begins, a warm start: the solution that the last step
    of a training had for the same sample. Zeros are no start. It saves steps where the
    linear solver has the tolerance of the forward solve, as the default has.
"""


def figures(
    num_steps: Array, is_failed: Array, relative: Array, is_batch: bool
) -> Float[Array, "4"]:
    """The four numbers of a monitor, for one solve or for a batch of them."""
    columns = (jnp.ones_like(num_steps), num_steps, is_failed, relative)
    found = jnp.stack([x.astype(jnp.float32) for x in columns])
    found = jnp.where(jnp.isfinite(found), found, 0)
    return jnp.sum(found, axis=1) if is_batch else found


def as_vector(monitor: AdjointMonitor) -> Float[Array, "4"]:
    """The four numbers of a monitor, or of its tangent, in which `None` is zero."""
    leaves = (
        monitor.num_solves,
        monitor.num_steps,
        monitor.num_failed,
        monitor.residual,
    )
    return jnp.stack([_zero() if x is None else x for x in leaves])
