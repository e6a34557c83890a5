from jaxtyping import Array, Float, Inexact

from .reference import max_residual as _reference


def max_residual(
    y: Inexact[Array, "..."],
    f: Inexact[Array, "..."],
    rtol: Float[Array, ""],
    atol: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    r"""Judge an iterate `y` with image `f` in the maximum norm, in one pass.

    $\max_i |f_i - y_i|$, $\; \max_i |f_i - y_i| / (\mathrm{atol} + \mathrm{rtol}
    |y_i|)$, $\; \max_i |y_i|$

    with the quotient zero where $f_i = y_i$, whatever the tolerance. Computed in the
    dtype of the tolerances.

    **Arguments:**

    - `y`: The iterate, real or complex.
    - `f`: Its image, like `y`.
    - `rtol`, `atol`: The tolerances, of one real dtype, not narrower than that of `y`.

    **Returns:**

    The residual, the residual in units of the tolerance, and the size of `y`: zero for
    empty arrays, and not a number if anything is. Cost: reads `y` and `f` once.
    """
    return _reference(y, f, rtol, atol)
