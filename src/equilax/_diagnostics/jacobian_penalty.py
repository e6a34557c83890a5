import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, Scalar

from .._check import (
    check_callable,
    check_data,
    check_instance,
    check_integer,
    check_key,
)
from .._custom_types import Args, Aux, MaybeAuxFn, Y
from .._dtype import residual_dtype
from .._mesh import any_varying, vary_over
from .._misc import struct
from .._ravel import raveller
from .._trace import as_state, trace, ValueOf


@eqx.filter_jit
def _penalty(fn, y, args, key, num_samples, has_aux) -> Scalar:
    hoisted, y = trace(fn, as_state(y, "y"), args, has_aux, None, "y")
    value_of, dtype = ValueOf(hoisted), residual_dtype(y)
    ravel, unravel = raveller(struct(y))
    flat = ravel(y)
    image, transposed = jax.vjp(lambda x: ravel(value_of(unravel(x), args)), flat)
    if flat.size == 0:
        return jnp.zeros((), dtype)
    signs = jr.rademacher(key, (num_samples, flat.size), image.dtype)
    signs = vary_over(signs, any_varying(image))
    (products,) = jax.vmap(transposed)(signs)
    return jnp.mean(jnp.sum(products.astype(dtype) ** 2, axis=1)) / flat.size


def jacobian_penalty(
    fn: MaybeAuxFn[Y, Aux],
    y: Y,
    args: Args = None,
    *,
    key: PRNGKeyArray,
    num_samples: int = 1,
    has_aux: bool = False,
) -> Scalar:
    r"""Estimate the squared Frobenius norm of a Jacobian, to keep it small in training.

    With $J = \partial f / \partial y$ of `n` rows, and $v$ of `n` signs at random,

    $\frac{1}{n} \mathrm{E} \|J^T v\|_2^2 = \frac{1}{n} \|J\|_F^2$

    (Hutchinson 1990; Bai, Koltun and Kolter 2021). The estimate is its mean
    over `num_samples` such vectors. $\|J\|_F^2 / n$ is the mean square of the singular
    values, and not below that of the magnitudes of the eigenvalues.

    Added to a loss, at the equilibrium, it keeps the layer quick to solve. One sample
    is enough for that, in every step or, as in the paper, in a part of the steps, taken
    at random.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a tree like `y`, as for [`equilax.fixed_point`][].
    - `y`: Where the Jacobian is taken: an equilibrium, in general.
    - `args`: Passed to `fn`.
    - `key`: A PRNG key. Keyword only argument.
    - `num_samples`: The number of vectors. The deviation falls as its square root.
        Keyword only argument.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.

    **Returns:**

    A scalar, not negative, in the real dtype of `y` and at least float32. It has a
    derivative in `y`, `args` and all that `fn` has captured; a complex number counts as
    its two parts, in `J` and in `n`.

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.

    Cost: one evaluation of `fn` and `num_samples` products with $J^T$; its gradient
    takes about twice that again. Memory: `num_samples` linearisations.
    """
    check_callable("fn", fn, "fn(y, args)")
    check_key("key", key)
    check_integer("num_samples", num_samples, 1)
    check_instance("has_aux", has_aux, bool)
    check_data(y=y, args=args)
    return _penalty(fn, y, args, key, int(num_samples), has_aux)
