import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._bounds import bounds, ErrorBound, flatten, vary_together
from .._check import (
    check_callable,
    check_data,
    check_instance,
    check_integer,
    check_nonnegative,
)
from .._custom_types import Args, Aux, MaybeAuxFn, RealScalarLike, Y
from .._dtype import rounding
from .._mesh import any_varying
from .._solution import Solution
from .._trace import as_state, trace, ValueOf


@eqx.filter_jit
def _error_bound(fn, y, args, has_aux, num_steps, tolerance) -> ErrorBound:
    y, axes = as_state(y), frozenset()
    while True:
        # Of what is replicated the derivative would be summed over the devices.
        axes = axes | any_varying(fn, y, args)
        fn, y, args = vary_together((fn, y, args), axes)
        hoisted, y = trace(fn, y, args, has_aux, None)
        if any_varying(hoisted, y) <= axes:
            break
        axes = axes | any_varying(hoisted)
    flat = flatten(ValueOf(hoisted), y, args)
    dtype = flat.y.dtype
    if flat.y.size == 0:
        return ErrorBound(*[jnp.zeros((), dtype)] * 4)
    tolerance = lax.stop_gradient(jnp.asarray(tolerance, dtype))
    return bounds(flat, num_steps, tolerance, rounding(y))


def _check_tolerance(tolerance):
    if isinstance(tolerance, (bool, str, complex)) or not eqx.is_array_like(tolerance):
        raise TypeError(f"`tolerance` must be a real number; got {tolerance!r}.")
    if np.shape(tolerance) != ():
        raise ValueError(
            "`tolerance` must be one number; got one of shape "
            f"{np.shape(tolerance)}. Inside `jax.vmap` there is one for each sample."
        )
    check_nonnegative("tolerance", tolerance)


def error_bound(
    sol: Solution[Y, Aux],
    fn: MaybeAuxFn[Y, Aux],
    args: Args = None,
    *,
    has_aux: bool = False,
    num_steps: int = 32,
    tolerance: RealScalarLike = 0.0,
) -> ErrorBound:
    r"""Bound the error of a solution, and that of its gradient.

    With $J = \partial f / \partial y$, $B = \partial f / \partial \theta$, the residual
    $r = f(y) - y$, and a contraction $L \geq \|J\|_2$ on the way from $y$ to $y^*$,
    Banach's a-posteriori estimate is $\|y - y^*\|_2 \leq \|r\|_2 / (1 - L)$. Two steps
    of Newton-GMRES lead to a point $p$ with a residual $r_p$ that is far smaller, from
    which the same estimate gives the second of

    $\|y - y^*\| \leq \min\left(\frac{\|r\|}{1 - L},
    \|y - p\| + \frac{\|r_p\|}{1 - L}\right) = E.$

    The smaller one is `value`. The gradient of a cotangent $v$ at $y$ is $S(y)^T v$
    with $S = (I - J)^{-1} B$, and is off by at most $\|v\|$ times

    $\|S(y) - S(y^*)\| \leq \frac{1}{1 - L} \left(\|J(y) - J(y^*)\|
    \frac{\|B(y^*)\|}{1 - L} + \|B(y) - B(y^*)\| + \epsilon \|B(y)\|\right),$

    which follows from $(I - J)(S - S^*) = (B - B^*) + (J - J^*) S^*$, and in which
    $\epsilon$ is `tolerance`. Differences are $E$ times those between $y$ and $p$, per
    distance. Of norms of operators a bound is taken, by Golub and Kahan's
    bidiagonalisation (1965) from a start at random with the bound of Hochstenbach
    (2013, Probabilistic upper bounds for the matrix two-norm); it is too small with a
    probability of one in a thousand. $L$ is the largest of $\|J\|$ at $y$, at $p$ and
    in the middle, and more the less certain it is that $p$ is $y^*$: by the change of
    $J$ over the distance that is left. Residuals are taken to be uncertain by four
    units in the last place of `fn`.

    Both bounds are infinite where $L \geq 1$, or something is not finite. That does not
    say that `y` is far off, but that this cannot tell: `fn` need not contract in the
    two-norm to have a fixed point, or for a solver to find it.

    Neither bound is a proof. They can be too small where $J$ changes by more between
    the points at which it is looked at than from one to the next, as at a kink close
    by, or where `fn` loses more than four units in the last place.

    **Arguments:**

    - `sol`: An [`equilax.Solution`][], successful or not. Of it, only `value` is used.
    - `fn`: The function that was solved for, as for [`equilax.fixed_point`][].
    - `args`: Passed to `fn`. The gradient is that with respect to its floating-point
        and complex arrays and those that `fn` has captured, all in one two-norm. Inside
        `jax.shard_map` it is infinite if `fn` has captured what is the same on all
        devices: pass that in `args`.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.
    - `num_steps`: The most steps of each Lanczos and GMRES iteration. Too few make the
        bounds larger, or infinite. Keyword only argument.
    - `tolerance`: The two-norm of the residual at which the adjoint's linear solve
        stops, relative to the cotangent, dimensionless: zero is a gradient that is
        exact at `y`. Keyword only argument.

    **Returns:**

    An [`equilax.ErrorBound`][], of scalars in the real dtype of `y` and at least
    float32. Its derivative is zero. Under `jax.vmap` there is one for each sample; a
    solve with a `batch_axis` counts as one problem.

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.

    Cost: five evaluations and ten linearisations of `fn`, at most `8 num_steps`
    products with $J$ and `5 num_steps` with $J^T$, and `3 num_steps` each with $B$ and
    $B^T$. Memory: `num_steps + 12` times `y`, six times `args`, and two linearisations.
    """
    check_instance("sol", sol, Solution)
    check_callable("fn", fn, "fn(y, args)")
    check_instance("has_aux", has_aux, bool)
    check_data(args=args)
    check_integer("num_steps", num_steps, 1)
    _check_tolerance(tolerance)
    return _error_bound(fn, sol.value, args, has_aux, int(num_steps), tolerance)
