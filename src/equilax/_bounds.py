"""The error of a fixed point, bounded through the contraction of its function."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree, Scalar

from ._batching import Vmapped
from ._dtype import residual_dtype
from ._krylov.gmres import gmres
from ._mesh import any_varying, vary_over, varying
from ._misc import struct
from ._norm import divisor, two_norm
from ._ravel import raveller
from ._singular_value import bidiagonalise, bound_from, linear_pair, start_vector


# How far a step of Newton's is found. What is left is in the bound.
_STEP_TOLERANCE = 1e-3
_NUM_NEWTON = 2
# An evaluation of `fn` is taken to be off by so many units in its last place.
_ULPS = 4


class ErrorBound(eqx.Module):
    """How far a value and its gradient may be from those of the fixed point.

    **Attributes:**

    - `value`: Bounds the two-norm of `y - y*`, in the units of `y`.
    - `gradient`: Bounds the two-norm of the gradient's error per two-norm of the
        cotangent, in the units of `y` over those of `args`.
    - `contraction`: The factor by which `fn` brings points next to `y` and `y*` closer,
        in the two-norm, dimensionless: an estimate from above.
    - `residual`: The two-norm of `fn(y) - y`, in the units of `y`.
    """

    value: Scalar
    gradient: Scalar
    contraction: Scalar
    residual: Scalar


ErrorBound.__init__.__doc__ = """**Arguments:**

- `value`: As the attribute.
- `gradient`: As the attribute.
- `contraction`: As the attribute.
- `residual`: As the attribute.
"""


class Flat(eqx.Module):
    # `fn` from one real vector and the vector of all parameters to one vector.
    of_both: Callable[[Array, Array], Array] = eqx.field(static=True)
    y: Float[Array, " n"]
    params: Float[Array, " m"]
    rounded: Callable[[Array], Array] = eqx.field(static=True)
    rounding: Callable[[Array], Scalar] = eqx.field(static=True)
    has_all_params: bool = eqx.field(static=True)

    def __call__(self, y: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.of_both(y, self.params)

    def in_params(self, y: Float[Array, " n"]) -> tuple[Callable, Callable]:
        """The derivative in the parameters, transposed, and that transposed again."""
        forward, backward = linear_pair(lambda p: self.of_both(y, p), self.params)
        return backward, forward


def vary_together(tree: PyTree[Any], axes: frozenset[str]) -> PyTree[Any]:
    """Declare all that has a derivative to vary over `axes`."""
    cast = lambda x: vary_over(x, axes) if eqx.is_inexact_array(x) else x
    return jtu.tree_map(cast, tree)


def flatten(value_of, y: PyTree[Array], args) -> Flat:
    """One vector for all that varies, in which norms are those of all leaves."""
    axes = any_varying(value_of, args, y)
    is_whole = [
        varying(x) == axes
        for x in jtu.tree_leaves(eqx.filter(value_of, eqx.is_inexact_array))
    ]
    is_param = lambda x: eqx.is_inexact_array(x) and varying(x) == axes
    y, value_of, args = jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x,
        (y, value_of, args),
    )
    params, static = eqx.partition((value_of, args), is_param)
    ravel, unravel = raveller(struct(y))
    dtype = residual_dtype(y)
    flat = lambda y: ravel(y).astype(dtype)
    has_params = len(jtu.tree_leaves(params)) > 0
    if has_params:
        ravel_params, unravel_params = raveller(struct(params))
        vector = ravel_params(params).astype(dtype)
    else:
        unravel_params = lambda _: params
        vector = vary_over(jnp.zeros((0,), dtype), axes)

    def of_both(y, vector):
        value_of, args = eqx.combine(unravel_params(vector), static)
        return flat(value_of(unravel(y), args))

    def error(y):
        ulp = lambda x: x * float(jnp.finfo(x.dtype).eps)
        return _ULPS * two_norm(jtu.tree_map(ulp, unravel(y))).astype(dtype)

    return Flat(
        of_both, flat(y), vector, lambda y: flat(unravel(y)), error, all(is_whole)
    )


def _closer(fn: Flat, image: Float[Array, " n"], num_steps: int):
    """A point closer to the solution, and its image: by Newton, or by iteration."""
    tolerance = jnp.asarray(_STEP_TOLERANCE, fn.y.dtype)
    tolerance = vary_over(tolerance, any_varying(image))

    def step(_, carry):
        y, image = carry
        residual = image - y
        _, product = jax.linearize(fn, y)
        found = gmres(
            lambda t: t - product(t),
            residual,
            tolerance=tolerance,
            restart=num_steps,
            max_steps=num_steps,
            batching=Vmapped(),
        )
        newton = fn.rounded(y + found.value)
        # Also false where the step is not a number.
        is_closer = two_norm(fn(newton) - newton) < two_norm(residual)
        new_y = jnp.where(is_closer, newton, image)
        return new_y, fn(new_y)

    return lax.fori_loop(0, _NUM_NEWTON, step, (fn.y, image))


def _at_most(bound: Scalar) -> Scalar:
    """`bound`, or infinity where it is not a number."""
    return jnp.where(jnp.isnan(bound), jnp.inf, bound)


def bounds(fn: Flat, num_steps: int, tolerance: Scalar, eps: float) -> ErrorBound:
    y, size = fn.y, two_norm
    image = fn(y)
    residual = size(image - y)
    numerator = residual + fn.rounding(image)
    closer, image = _closer(fn, image, num_steps)
    gap = size(closer - y)
    remainder = size(image - closer) + fn.rounding(image)

    # Differences are taken over the gap, or over what rounding leaves of it.
    least = eps**0.5 * jnp.maximum(size(y), size(image))
    direction = start_vector(y.size, y.dtype)
    direction = jnp.where(gap > 0, (closer - y) / divisor(gap), direction)
    probe = fn.rounded(y + jnp.maximum(gap, least) * direction)
    distance = divisor(size(probe - y))

    points = jnp.stack([y, 0.5 * (y + probe), probe])
    at_points = lax.map(
        lambda y: bidiagonalise(*linear_pair(fn, y), (y, y), num_steps), points
    )

    def change(of_y, like):
        (a, a_t), (b, b_t) = of_y(y), of_y(probe)
        pair = lambda t: b(t) - a(t), lambda ct: b_t(ct) - a_t(ct)
        return bidiagonalise(*pair, like, num_steps)

    like = (y, fn.params)
    others = (
        change(lambda y: linear_pair(fn, y), (y, y)),
        bidiagonalise(*fn.in_params(y), like, num_steps),
        change(fn.in_params, like),
    )
    # All in one, for the sake of compilation.
    others = jtu.tree_map(lambda *x: jnp.stack(x), *others)
    entries = jtu.tree_map(lambda *x: jnp.concatenate(x), at_points, others)
    norms = jax.vmap(lambda x: bound_from(x, y.size))(entries)
    seen, sensitivity = jnp.max(norms[:3]), norms[4]
    growth, drift = norms[3] / distance, norms[5] / distance

    beyond = remainder / (1 - seen)
    contraction = jnp.where(seen < 1, seen + growth * beyond, seen)
    margin = 1 - contraction
    value = jnp.minimum(numerator / margin, gap + remainder / margin)

    moved = drift * value
    of_solution = growth * value * (sensitivity + moved) / margin + moved
    gradient = (of_solution + tolerance * sensitivity) / margin
    gradient = gradient if fn.has_all_params else jnp.full_like(gradient, jnp.inf)
    value, gradient = (
        jnp.where(contraction < 1, _at_most(x), jnp.inf) for x in (value, gradient)
    )
    return ErrorBound(value, gradient, contraction, residual)
