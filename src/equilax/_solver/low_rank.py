"""Estimates of a Jacobian, or of its inverse, that differ from one by a low rank."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._custom_types import AxisName, IntScalar
from . import ring


class Memory(eqx.Module):
    r"""$B = I - \sum_j c_j r_j^T / (r_j^T r_j)$, and its inverse $I + C^T W R$.

    **Attributes:**

    - `steps`: A ring of the $r_j$, which are orthogonal to each other, each divided by
        its largest element. A row of zeros holds a place and nothing else.
    - `changes`: A ring of the $c_j = (I - B) r_j$.
    - `squares`: The $r_j^T r_j$.
    - `inverse`: $W$, zero where a row does not count.
    - `num_used`: How many of the last rows count.
    """

    steps: PyTree[Array]
    changes: PyTree[Array]
    squares: Float[Array, " m"]
    inverse: Float[Array, "m m"]
    num_used: IntScalar


def empty(y: PyTree[Array], size: int, dtype: Any) -> Memory:
    rows, squares = ring.empty(y, size), jnp.zeros((size,), dtype)
    inverse = jnp.zeros((size, size), dtype)
    return Memory(rows, rows, squares, inverse, jnp.zeros((), jnp.int32))


def resume(old: Memory, next_slot: IntScalar) -> Memory:
    """The memory of an earlier solve, to be written on from its first slot."""
    turn = lambda x: ring.oldest_first(x, next_slot)
    inverse = ring.oldest_first_both(old.inverse, next_slot)
    return Memory(
        turn(old.steps), turn(old.changes), turn(old.squares), inverse, old.num_used
    )


def used(memory: Memory, newest: IntScalar) -> Bool[Array, " m"]:
    """Which rows count, the newest of which was written by the step `newest`."""
    m = memory.squares.shape[0]
    return (ring.ages(m, newest % m) < memory.num_used) & (memory.squares > 0)


def append(
    old: Memory,
    is_used: Bool[Array, " m"],
    is_slot: Bool[Array, " m"],
    row: PyTree[Array],
    surprise: PyTree[Array],
    least: Scalar,
    axis_name: AxisName,
) -> tuple[Scalar, Scalar, Float[Array, "m m"]]:
    r"""Update $B$ by $\theta z r^T / (r^T r)$ for a new `row` $r$ and `surprise` $z$.

    With $\theta = 1$ it then maps $r$ to its old image and $z$. A smaller one keeps the
    determinant from changing by a factor below `least` (Powell 1970; the function
    $\phi$ of Zhang, O'Donoghue and Boyd 2020).

    **Returns:**

    $\theta$, the square of the row, and `Memory.inverse` with what is in its slot.
    """
    dtype = old.inverse.dtype
    products = lambda rows, x: jnp.where(
        is_used, ring.products(rows, x, dtype, axis_name), 0
    )
    square = ring.inner(row, row, dtype, axis_name)
    square = jnp.where(square > 0, square, 1)
    left = multiply(old.inverse, products(old.steps, surprise))
    across = products(old.changes, row)
    # r^T B^-1 z / r^T r, by which a whole step would change the determinant: Powell's
    # gamma, less one.
    excess = (
        ring.inner(row, surprise, dtype, axis_name) + multiply(across, left)
    ) / square
    bound = jnp.where(1 + excess < 0, -least, least)
    is_far = jnp.abs(1 + excess) >= least
    theta = jnp.where(is_far, 1, (bound - 1) / jnp.where(is_far, 1, excess))
    # The matrix of which `inverse` is the inverse gets a row and a column more.
    left = jnp.where(is_slot, 1, -theta * left)
    right = jnp.where(is_slot, 1, multiply(across, old.inverse))
    pivot = square * (1 + theta * excess)
    return theta, square, old.inverse + jnp.outer(left, right) / pivot


def multiply(a: Array, b: Array) -> Array:
    """A product of small matrices and vectors, exact on every device."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
