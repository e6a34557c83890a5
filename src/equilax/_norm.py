import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Inexact, PyTree, Scalar

from ._check import check_axis_name, check_callable, check_data
from ._custom_types import AxisName, Norm
from ._dtype import at_least_single, promote, real
from ._mesh import from_all, num_parts


def _magnitude(x: Any) -> Inexact[Array, "..."]:
    """Absolute values, in the real dtype of `x` and at least float32."""
    check_data(x=x)
    if not eqx.is_array_like(x) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise TypeError(
            "`x` must be a pytree of floating-point or complex arrays; got a leaf "
            f"{x!r}."
        )
    x = jnp.asarray(x)
    return jnp.abs(x).astype(at_least_single(real(x.dtype)))


@jax.custom_jvp
def _flat_at_zero(x: Scalar) -> Scalar:
    return x


# A norm has no derivative at zero. Zero is the one that leaves a loss which adds a
# residual to something else unharmed; see jax-ml/jax issue 3058.
@_flat_at_zero.defjvp
def _flat_at_zero_jvp(primals, tangents):
    (x,), (t_x,) = primals, tangents
    return x, jnp.where(x == 0, 0, t_x)


def _reduce(tree: PyTree[Array], leaf_norm, join) -> Scalar:
    leaves = [_magnitude(x) for x in jtu.tree_leaves(tree)]
    dtype = promote(jnp.float32, *(x.dtype for x in leaves))
    parts = [leaf_norm(x).astype(dtype) for x in leaves if x.size > 0]
    return ft.reduce(join, parts) if parts else jnp.zeros((), dtype)


def max_norm(x: PyTree[Inexact[Array, "..."]], axis_name: AxisName = None) -> Scalar:
    r"""The largest magnitude in `x`: $\max_i |x_i|$, over all leaves.

    **Arguments:**

    - `x`: A pytree of real or complex arrays.
    - `axis_name`: The mesh axes along which the leaves are split, one part a device.

    **Returns:**

    A scalar in the units of `x`, real and at least float32. Zero for an empty tree. Not
    a number if any element is. Cost: one pass over `x`, and an all-reduce of a number a
    device if there is an `axis_name`.
    """
    if axis_name is not None:
        check_axis_name(axis_name)
        return max_norm(from_all(max_norm(x), axis_name))
    return _flat_at_zero(_reduce(x, jnp.max, jnp.maximum))


def divisor(size: Scalar) -> Scalar:
    """`size`, or one where it is nothing to divide by: zero, infinite, not a number."""
    return jnp.where((size == 0) | ~jnp.isfinite(size), 1, size)


def two_norm(x: PyTree[Inexact[Array, "..."]], axis_name: AxisName = None) -> Scalar:
    r"""The Euclidean norm $\sqrt{\sum_i |x_i|^2}$, over all leaves.

    The elements are divided by the largest before they are squared, so that neither
    1e-30 nor 1e+30 leaves the range of float32.

    **Arguments:**

    - `x`: A pytree of real or complex arrays.
    - `axis_name`: The mesh axes along which the leaves are split, one part a device.

    **Returns:**

    A scalar in the units of `x`, real and at least float32. Zero for an empty tree. Not
    a number if any element is. Cost: two passes over `x`, and an all-reduce of a number
    a device if there is an `axis_name`.
    """
    if axis_name is not None:
        check_axis_name(axis_name)
        return two_norm(from_all(two_norm(x), axis_name))
    # Frozen, or the derivative would run through the largest element twice.
    largest = jax.lax.stop_gradient(max_norm(x))
    scale = divisor(largest)
    squares = _reduce(x, lambda a: jnp.sum((a / scale.astype(a.dtype)) ** 2), jnp.add)
    positive = jnp.where(squares == 0, 1, squares)
    return jnp.where(squares == 0, 0, scale * jnp.sqrt(positive))


def rms_norm(x: PyTree[Inexact[Array, "..."]], axis_name: AxisName = None) -> Scalar:
    r"""The root of the mean square, $\|x\|_2 / \sqrt{n}$ for `n` elements in all.

    **Arguments:**

    - `x`: A pytree of real or complex arrays.
    - `axis_name`: The mesh axes along which the leaves are split, one part a device.

    **Returns:**

    A scalar in the units of `x`, real and at least float32. Zero for an empty tree. Not
    a number if any element is. Cost: two passes over `x`, and an all-reduce of a number
    a device if there is an `axis_name`.
    """
    check_axis_name(axis_name)
    return two_norm(x, axis_name) / math.sqrt(max(num_elements(x, axis_name), 1))


class RelativeToNorm(eqx.Module):
    r"""A norm, with tolerances that count in the norm of the whole.

    Given to a solver as its `norm`, a solve has converged where
    $\|f(y) - y\| < \mathrm{atol} + \mathrm{rtol} \|y\|$, and not where
    $\|(f(y) - y) / (\mathrm{atol} + \mathrm{rtol} |y|)\| < 1$, which each element has
    to meet in units of its own.

    Use it where an element near zero matters no more than the others do: with `atol=0`
    a solve does not go on for the digits of the smallest element, and the samples of a
    batch end after more equal numbers of steps.

    Called, it is the norm inside. Cost: that of the norm inside, of `fn(y) - y` and of
    `y`; one pass over both for [`equilax.max_norm`][].
    """

    norm: Norm = max_norm

    def __check_init__(self):
        check_callable("norm", self.norm, "norm(y)")

    def __call__(
        self, x: PyTree[Inexact[Array, "..."]], axis_name: AxisName = None
    ) -> Scalar:
        """The norm of `x`, split along the mesh axes `axis_name`."""
        return measured(self.norm, x, axis_name)


RelativeToNorm.__init__.__doc__ = """**Arguments:**

- `norm`: The norm `PyTree -> Scalar`.
"""


def num_elements(x: PyTree[Any], axis_name: AxisName = None) -> int:
    """The elements of all leaves, on all devices along which they are split."""
    return num_parts(axis_name) * sum(
        getattr(leaf, "size", 1) for leaf in jtu.tree_leaves(x)
    )


def measured(norm: Norm, x: PyTree[Array], axis_name: AxisName) -> Scalar:
    """`x` in a norm that may be a user's, who need not know of mesh axes."""
    return norm(x) if axis_name is None else norm(x, axis_name)
