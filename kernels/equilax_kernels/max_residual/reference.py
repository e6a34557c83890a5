import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact


def max_residual(
    y: Inexact[Array, "..."],
    f: Inexact[Array, "..."],
    rtol: Float[Array, ""],
    atol: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    dtype = rtol.dtype
    if not jnp.iscomplexobj(y):
        y, f = y.astype(dtype), f.astype(dtype)
    moved, size = jnp.abs(f - y).astype(dtype), jnp.abs(y).astype(dtype)
    unit = jnp.where(moved == 0, 1, atol + rtol * size)
    # One reduction of three: compilers keep three apart, and each is a pass of its own.
    return lax.reduce(
        (moved, moved / unit, size),
        (jnp.zeros((), dtype),) * 3,
        lambda a, b: tuple(map(jnp.maximum, a, b)),
        tuple(range(y.ndim)),
    )
