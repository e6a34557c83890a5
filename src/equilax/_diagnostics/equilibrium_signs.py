from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._adjoint import ImplicitAdjoint
from .._batching import AbstractBatching, Staged
from .._check import check_callable, check_data, check_nonnegative
from .._custom_types import Args, Aux, IntScalar, MaybeAuxFn, RealScalarLike, Y
from .._dtype import residual_dtype
from .._fixed_point import solve
from .._misc import difference, struct
from .._norm import divisor, two_norm
from .._ravel import raveller
from .._settings import Settings
from .._solution import RESULTS
from .._solver import AbstractFixedPointSolver
from .._trace import as_state


class EquilibriumSigns(eqx.Module):
    r"""Whether a solve does anything, and whether it leads to one place.

    The distance of `a` and `b` is that of the two-norm, relative to the larger one,
    $\|a - b\| / \max(\|a\|, \|b\|)$: a number in [0, 2].

    **Attributes:**

    - `change_from_start`: The distance of the output at the solution from that at `y0`.
        Near zero the solver is a no-op: the model has learnt to begin at the end.
    - `change_from_image`: That from the output at `fn(y0)`. Near zero one application
        of `fn` does all the work, and the equilibrium is a layer like others.
    - `spread`: The largest distance between two of the solutions that converged, where
        both are near zero relative to `tolerance` times the largest start. At the level
        of the solver's tolerance the equilibrium does not depend on the start.
    - `num_equilibria`: How many of them are apart from all before them. One is what a
        model with an equilibrium should have; none if nothing converged.
    - `num_failed`: How many solves did not converge. What they ended with is no
        equilibrium, and is left out of the two above.
    - `alignment`: The cosine of the angle between the solution and that from each of
        `starts`, in their order, failed or not. From the solutions of other samples it
        is the asymptotic alignment score of Anil et al. (2022): near one the model is
        independent of the path, which there goes with getting better by more steps on
        harder problems.
    """

    change_from_start: Scalar
    change_from_image: Scalar
    spread: Scalar
    num_equilibria: IntScalar
    num_failed: IntScalar
    alignment: Float[Array, " num"]


EquilibriumSigns.__init__.__doc__ = """**Arguments:**

- `change_from_start`: As the attribute.
- `change_from_image`: As the attribute.
- `spread`: As the attribute.
- `num_equilibria`: As the attribute.
- `num_failed`: As the attribute.
- `alignment`: As the attribute.
"""


def _distance(a: PyTree[Array], b: PyTree[Array], least: Scalar | float = 0.0):
    """In the two-norm, relative to the larger one, or to `least` if that is more."""
    larger = jnp.maximum(jnp.maximum(two_norm(a), two_norm(b)), least)
    return two_norm(difference(a, b)) / divisor(larger)


def _cosine(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    """Of the angle between two trees, each as one real vector. Zeros are alike."""
    ravel, _ = raveller(struct(a))
    dtype: Any = residual_dtype(a)
    a, b = (ravel(x).astype(dtype) for x in (a, b))
    sizes = two_norm(a), two_norm(b)
    a, b = (x / divisor(size) for x, size in zip((a, b), sizes, strict=True))
    is_zero = (sizes[0] == 0) & (sizes[1] == 0)
    return jnp.where(is_zero, 1, jnp.sum(a * b))


def _stack(y0: PyTree[Array], starts: PyTree[Array]) -> PyTree[Array]:
    """All starts, the usual one first, or an error if the others are not like it."""
    if jtu.tree_structure(y0) != jtu.tree_structure(starts):
        raise ValueError(
            "`starts` must have the structure of `y0`; got\n"
            f"  {jtu.tree_structure(starts)}\nexpected\n  {jtu.tree_structure(y0)}."
        )
    pairs = list(zip(jtu.tree_leaves(y0), jtu.tree_leaves(starts), strict=True))
    nums = {x.shape[:1] for _, x in pairs}
    is_like = all((x.shape[1:], x.dtype) == (y.shape, y.dtype) for y, x in pairs)
    if not is_like or len(nums) > 1 or nums == {()} or nums == {(0,)}:
        got = ", ".join(f"{x.dtype}{list(x.shape)}" for _, x in pairs)
        expected = ", ".join(f"{y.dtype}{['num', *y.shape]}" for y, _ in pairs)
        raise ValueError(
            "`starts` must be like `y0` with a new first axis of at least one; got "
            f"{got}, expected {expected}."
        )
    return jtu.tree_map(lambda y, x: jnp.concatenate([y[None], x]), y0, starts)


def _apart(
    ys: PyTree[Array],
    starts: PyTree[Array],
    is_found: Bool[Array, " num"],
    tolerance: Scalar,
) -> tuple[Scalar, IntScalar]:
    """The largest distance between two that were found, and how many are new."""
    # Of a solution of zero only the error is seen, which points anywhere.
    least = tolerance * jnp.max(jax.vmap(two_norm)(starts))
    # Row by row, for the sake of memory.
    distances = lax.map(lambda a: jax.vmap(lambda b: _distance(a, b, least))(ys), ys)
    is_pair = is_found[:, None] & is_found[None, :]
    spread = jnp.max(jnp.where(is_pair, distances, 0))
    is_seen = jnp.tril(is_pair & (distances <= tolerance), -1)
    is_new = is_found & ~jnp.any(is_seen, axis=1)
    return spread, jnp.sum(is_new, dtype=jnp.int32)


@eqx.filter_jit
def _signs(fn, y0, args, starts, output, tolerance, settings) -> EquilibriumSigns:
    y0, starts = as_state(y0), as_state(starts, "starts")

    def run(y):
        sol = solve(fn, y, args, settings)
        return sol.value, sol.result == RESULTS.successful

    starts = _stack(y0, starts)
    ys, is_found = jax.vmap(run)(starts)
    first = jtu.tree_map(lambda y: y[0], ys)
    image = fn(y0, args)[0] if settings.has_aux else fn(y0, args)
    outputs = [output(y) for y in (first, y0, image)]
    tolerance = jnp.asarray(tolerance, residual_dtype(y0))
    spread, num_equilibria = _apart(ys, starts, is_found, tolerance)
    signs = EquilibriumSigns(
        change_from_start=_distance(outputs[0], outputs[1]),
        change_from_image=_distance(outputs[0], outputs[2]),
        spread=spread,
        num_equilibria=num_equilibria,
        num_failed=jnp.sum(~is_found, dtype=jnp.int32),
        alignment=jax.vmap(lambda y: _cosine(first, y))(
            jtu.tree_map(lambda y: y[1:], ys)
        ),
    )
    return jtu.tree_map(lax.stop_gradient, signs)


def _same(y):
    return y


def equilibrium_signs(
    fn: MaybeAuxFn[Y, Aux],
    solver: AbstractFixedPointSolver,
    y0: Y,
    args: Args = None,
    *,
    starts: PyTree[Array],
    output: Callable[[Y], PyTree[Array]] = _same,
    tolerance: RealScalarLike = 1e-2,
    max_steps: int = 256,
    batching: AbstractBatching = Staged(),  # noqa: B008
    has_aux: bool = False,
) -> EquilibriumSigns:
    """Look for signs that an equilibrium is none, or not the only one.

    Solves from `y0` and from other starts, and compares. A trained layer may have
    learnt to start at its end, to need one application of `fn` alone, or to end
    wherever it started; its solves converge all the same.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a tree like `y`, as for [`equilax.fixed_point`][].
    - `solver`: A fixed-point solver. With both tolerances zero every solve takes
        `max_steps` steps and counts as converged.
    - `y0`: The usual start.
    - `args`: Passed to `fn`.
    - `starts`: Other starts, along a new first axis: solutions of other samples, and
        points at random about as large as a solution. Keyword only argument.
    - `output`: What the model makes of the state, for the changes from the start and
        from its image. Defaults to the state itself. Keyword only argument.
    - `tolerance`: The distance up to which two solutions are the same one; well above
        that to which they are solved. Dimensionless. Keyword only argument.
    - `max_steps`: The most steps to take. Keyword only argument.
    - `batching`: How the solves run as a batch. Keyword only argument.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.

    **Returns:**

    An [`equilax.EquilibriumSigns`][], which says how to read its figures. Its
    derivative is zero. Under `jax.vmap` there is one for each sample.

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.

    Cost: as many solves as there are starts and one, in one batch, and an evaluation of
    `fn`. Memory: that of the batch, and three times all the solutions.
    """
    check_callable("fn", fn, "fn(y, args)")
    check_callable("output", output, "output(y)")
    check_data(y0=y0, args=args, starts=starts)
    check_nonnegative("tolerance", tolerance)
    settings = Settings(
        solver,
        max_steps,
        ImplicitAdjoint(),
        batching,
        throw=False,
        state=None,
        monitor=None,
        has_aux=has_aux,
    )
    settings.check()
    return _signs(fn, y0, args, starts, output, tolerance, settings)
