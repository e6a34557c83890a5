import jax.numpy as jnp
from jaxtyping import Array, Float


def spd_solve(
    matrix: Float[Array, "m m"], vector: Float[Array, " m"], floor: Float[Array, ""]
) -> Float[Array, " m"]:
    size = vector.shape[0]
    rows = [[matrix[i, j] for j in range(i + 1)] for i in range(size)]
    return jnp.stack(solve_written_out(rows, [vector[i] for i in range(size)], floor))


def solve_written_out(
    rows: list[list[Array]], x: list[Array], floor: Float[Array, ""]
) -> list[Array]:
    """The same for the lower triangle as lists of arrays of one shape, a batch."""
    rows, x, size = [list(row) for row in rows], list(x), len(x)
    # Cholesky's factor, row by row, and the forward substitution beside it. A pivot
    # that rounding has pushed to zero or below is a direction without information: with
    # an infinite pivot it takes no part.
    for i in range(size):
        for j in range(i):
            for k in range(j):
                rows[i][j] = rows[i][j] - rows[i][k] * rows[j][k]
            rows[i][j] = rows[i][j] / rows[j][j]
        for k in range(i):
            rows[i][i] = rows[i][i] - rows[i][k] * rows[i][k]
            x[i] = x[i] - rows[i][k] * x[k]
        is_positive = rows[i][i] > floor
        pivot = jnp.sqrt(jnp.where(is_positive, rows[i][i], 1))
        rows[i][i] = jnp.where(is_positive, pivot, jnp.inf)
        x[i] = x[i] / rows[i][i]
    for i in reversed(range(size)):
        for k in range(i + 1, size):
            x[i] = x[i] - rows[k][i] * x[k]
        x[i] = x[i] / rows[i][i]
    return x
