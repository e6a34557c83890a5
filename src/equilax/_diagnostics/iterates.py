import functools as ft
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree, Scalar

from .._axis_names import check_axis_names
from .._batching import aligned, Vmapped
from .._check import (
    check_callable,
    check_data,
    check_fraction,
    check_instance,
    check_integer,
)
from .._custom_types import Args, Aux, MaybeAuxFn, Y
from .._mesh import any_varying
from .._solver import AbstractFixedPointSolver, make_loop
from .._trace import as_state, trace, ValueOf


@eqx.filter_jit
def _iterates(fn, solver, y0, args, indices, has_aux) -> PyTree[Array]:
    hoisted, y0 = trace(fn, as_state(y0), args, has_aux, None)
    batching = check_axis_names(hoisted, solver, y0, Vmapped())
    problem = (ValueOf(hoisted), solver, y0, args, None)
    inputs, static = eqx.partition(problem, eqx.is_array)
    loop = make_loop(
        static,
        # A pass ends with a step, so the last iterate is not evaluated.
        max_steps=max(indices[-1], 1),
        is_batch=False,
        axis_names=batching.axis_names,
    )

    def advance(carry):
        num_steps, now = carry
        return num_steps + 1, loop.body(num_steps, now, inputs)

    init = (jnp.zeros((), jnp.int32), loop.init(inputs))
    _, one_pass, carry = aligned(
        lambda _: jnp.array(True), advance, init, may_vary=any_varying(inputs)
    )

    # Of what lies between two points only the beginning is kept for the way back.
    @ft.partial(jax.checkpoint, static_argnums=1)
    def stretch(carry, length):
        carry, _ = lax.scan(lambda c, _: (one_pass(c), None), carry, length=length)
        return carry, carry[1].y

    points = []
    lengths = (b - a for a, b in itertools.pairwise((0, *indices)))
    # Stretches of one length in one loop, for the sake of compilation.
    for length, equal in itertools.groupby(lengths):
        step = lambda carry, _, length=length: stretch(carry, length)
        carry, found = lax.scan(step, carry, length=len(list(equal)))
        points.append(found)
    return jtu.tree_map(lambda *x: jnp.concatenate(x), *points)


def iterates(
    fn: MaybeAuxFn[Y, Aux],
    solver: AbstractFixedPointSolver,
    y0: Y,
    args: Args = None,
    *,
    indices: Sequence[int],
    has_aux: bool = False,
) -> Y:
    """The points of a solve after given numbers of steps, with gradients through these.

    For losses on the trajectory, fixed-point correction (Bai et al. 2022; Geng and
    Kolter 2023): [`equilax.correction_loss`][] adds up a loss at all of them. A layer
    that is trained so comes close in few steps.

    Point `k` is the iterate after `k` steps of the solver, zero is `y0`. A solve that
    converges, or fails, stays where it is. Steps that the solver takes back later are
    points like others. With both tolerances zero all steps are taken.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a tree like `y`, as for [`equilax.fixed_point`][].
    - `solver`: A fixed-point solver, such as [`equilax.Anderson`][].
    - `y0`: The initial guess.
    - `args`: Passed to `fn`.
    - `indices`: After how many steps, in rising order: `range(1, 9)`, or `(2, 4, 8)`.
        Keyword only argument.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.

    **Returns:**

    A tree like `y0`, each leaf with a new first axis, along `indices`. Its derivative,
    in forward mode as well as in reverse, is that of the steps: also in `y0`. It can be
    large where the steps of an accelerated solver hang on little; with
    `jax.lax.stop_gradient` around the points, and one more application of `fn` to each,
    it is the one-step gradient.

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.

    Cost: an evaluation of `fn` for each of the `indices[-1]` steps, converged or not;
    twice that and the products in reverse mode. Memory there: the carry of the solver
    for each index, and for each step of the longest stretch between two of them one
    linearisation.
    """
    check_callable("fn", fn, "fn(y, args)")
    check_instance("solver", solver, AbstractFixedPointSolver)
    check_instance("has_aux", has_aux, bool)
    check_data(y0=y0, args=args)
    if not isinstance(indices, Sequence) or len(indices) == 0:
        raise ValueError(
            "`indices` must be a sequence of at least one number of steps, such as "
            f"`range(1, 9)`; got {indices!r}."
        )
    for index in indices:
        check_integer("indices", index, 0)
    if any(a >= b for a, b in itertools.pairwise(indices)):
        raise ValueError(f"`indices` must rise; got {list(indices)}.")
    indices = tuple(int(index) for index in indices)
    return _iterates(fn, solver, y0, args, indices, has_aux)


def _check_points(points: PyTree[Any]):
    """Refuse what has no first axis of one size."""
    check_data(points=points)
    leaves = jtu.tree_leaves(points)
    is_inexact = lambda x: jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)
    if not leaves or not all(eqx.is_array_like(x) and is_inexact(x) for x in leaves):
        raise TypeError(
            "`points` must be a pytree of floating-point or complex arrays, as by "
            f"`equilax.iterates`; got {points!r}."
        )
    shapes = [jnp.shape(x) for x in leaves]
    if () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "`points` must have one size along the first axis of all leaves; got the "
            f"shapes {shapes}."
        )


def correction_loss(
    loss: Callable[[PyTree[Array]], Scalar],
    points: PyTree[Array],
    *,
    decay: float = 0.8,
) -> Scalar:
    r"""Add up a loss along a trajectory, the later a point the more.

    $\sum_{k=1}^n \mathrm{decay}^{n-k} \mathrm{loss}(y_k)$

    (Bai et al. 2022; Geng and Kolter 2023), with their decay of 0.8.

    **Arguments:**

    - `loss`: Maps one point to a scalar.
    - `points`: As [`equilax.iterates`][] returns them, along the first axis.
    - `decay`: The weight of a point relative to the next, in [0, 1). Keyword only
        argument.

    **Returns:**

    A scalar in the units of `loss`: the weights do not add up to one, and the last
    point has all of its own.

    Cost: `n` evaluations of `loss`, in one batch.
    """
    check_callable("loss", loss, "loss(y)")
    check_fraction("decay", decay)
    _check_points(points)
    losses = jax.vmap(loss)(points)
    if losses.ndim != 1:
        raise ValueError(
            f"`loss` must return a scalar; got the shape {losses.shape[1:]}."
        )
    ages = jnp.arange(losses.size, dtype=losses.dtype)[::-1]
    return jnp.sum(jnp.asarray(decay, losses.dtype) ** ages * losses)
