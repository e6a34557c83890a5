import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact, Scalar


def norm_bound(matrix: Inexact[Array, "n n"]) -> Scalar:
    r"""$\|G^{16}\|_F^{1/32} \geq \|M\|_2$ for $G = M^* M$, by five products.

    At most a factor of `n**(1/64)` above the norm, whatever the size of the elements. A
    singular value decomposition takes many times as long.
    """
    size = lax.stop_gradient(jnp.max(jnp.abs(matrix)))
    is_zero = size == 0
    unit = matrix / jnp.where(is_zero, 1, size).astype(matrix.dtype)
    unit = jnp.where(is_zero, jnp.ones_like(matrix), unit)  # Of which no one is told.
    power, log = unit.conj().T @ unit, 0.0
    for _ in range(4):
        scale = jnp.linalg.norm(power)
        scaled = power / scale.astype(power.dtype)
        power, log = scaled @ scaled, 2 * (log + jnp.log(scale))
    return size * jnp.exp((log + jnp.log(jnp.linalg.norm(power))) / 32)
