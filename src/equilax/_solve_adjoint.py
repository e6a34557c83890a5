from typing import Any, cast

from jaxtyping import PyTree

from ._adjoint import (
    AbstractImplicitAdjoint,
    checker,
    ImplicitAdjoint,
    linear_system,
    Problem,
    SharedInverseAdjoint,
    transpose_system,
)
from ._axis_names import check_axis_names
from ._batching import AbstractBatching, Staged
from ._check import check_callable, check_data, check_instance
from ._custom_types import Args, Aux, MaybeAuxFn, Y
from ._eager import compiled_for_each
from ._mesh import all_vary, any_varying
from ._misc import per_sample
from ._settings import Settings
from ._solution import Solution
from ._solver import AbstractFixedPointSolver, check_solver_state
from ._trace import (
    as_state,
    check_batch,
    check_like,
    move,
    trace,
    ValueOf,
)


@compiled_for_each
def _solve_adjoint(fn, y, cotangent, args, guess, settings: Settings) -> Solution:
    solver, state, batch_axis = settings.solver, settings.state, settings.batch_axis
    y = as_state(y)
    check_batch(y, batch_axis)
    is_batch = batch_axis is not None
    cotangent = check_like("cotangent", cotangent, y)
    guess = None if guess is None else check_like("guess", guess, y)
    hoisted, y = trace(fn, y, args, settings.has_aux, batch_axis)
    batching = check_axis_names(hoisted, solver, y, settings.batching)
    if state is None:
        state = per_sample(is_batch)(lambda y: solver.init(y, max_steps=1))(y)
    else:
        check_solver_state(solver, y, state, 1, per_sample(is_batch))
    problem = Problem(
        ValueOf(hoisted),
        solver,
        y,
        args,
        state,
        None,
        batching,
        settings.tags,
        1,
        settings.throw,
        is_batch,
        settings.fuse,
    )
    rule = cast(AbstractImplicitAdjoint, settings.adjoint).rule(problem)
    system = linear_system(rule, problem, y, state)
    flipped = transpose_system(system, y)
    axes = any_varying(y)

    def as_vector(tree):
        tree = move(tree, batch_axis, 0)
        return flipped.to_vector(all_vary(tree, axes))

    start = None if guess is None else as_vector(guess)
    vector = as_vector(cotangent)
    outcome = system.transpose_solve(flipped.mv, vector, start)
    value = outcome.value
    if settings.throw:
        value = checker(rule, problem)(outcome)
    stats = {**outcome.stats, "is_usable": outcome.is_usable}
    value = move(flipped.from_vector(value), 0, batch_axis)
    return Solution(value, outcome.result, None, stats, None)


def adjoint_by(fn, y, cotangent, args, guess, settings: Settings) -> Solution:
    """As [`equilax.solve_adjoint`][], by `settings`."""
    settings.check()
    check_instance("adjoint", settings.adjoint, AbstractImplicitAdjoint)
    if settings.state is None and isinstance(settings.adjoint, SharedInverseAdjoint):
        raise ValueError(
            "`state` must be the `Solution.state` of the forward pass for a "
            "`SharedInverseAdjoint`, which takes its estimate from there; got None."
        )
    return _solve_adjoint(fn, y, cotangent, args, guess, settings)


def solve_adjoint(
    fn: MaybeAuxFn[Y, Aux],
    solver: AbstractFixedPointSolver,
    y: Y,
    cotangent: Y,
    args: Args = None,
    *,
    has_aux: bool = False,
    adjoint: AbstractImplicitAdjoint = ImplicitAdjoint(),  # noqa: B008
    batching: AbstractBatching = Staged(),  # noqa: B008
    throw: bool = True,
    tags: frozenset[object] = frozenset(),
    batch_axis: int | None = None,
    state: PyTree[Any] = None,
    guess: Y | None = None,
) -> Solution[Y, None]:
    r"""Do the linear solve of a backward pass, and tell how it went.

    $u = (I - J^T)^{-1} v$ for a cotangent $v$ of the solution $y$, just as the gradient
    of [`equilax.fixed_point`][] with the same arguments does it. The gradient in `args`
    is then the product of $u$ with the derivative of `fn` in these.

    **Arguments:**

    - `fn`, `args`, `has_aux`, `batching`, `tags`, `batch_axis`: As for
        [`equilax.fixed_point`][].
    - `solver`: The solver of the forward pass, for its tolerances.
    - `y`: The solution.
    - `cotangent`: The derivative of a loss in the solution, a tree like `y`, by the
        convention of `jax.vjp`.
    - `adjoint`: Which adjoint's solve to do, an [`equilax.ImplicitAdjoint`][] or an
        [`equilax.SharedInverseAdjoint`][]. Keyword only argument.
    - `throw`: Whether a failed solve raises. If not, `Solution.result` says how it
        ended, and the value is what it ended with, whatever the `on_failure` of the
        adjoint is. Keyword only argument.
    - `state`: The `Solution.state` of the forward pass, for the estimate of an inverse.
        Keyword only argument.
    - `guess`: Where to begin, the value for a cotangent or a problem nearby. Keyword
        only argument.

    **Returns:**

    An [`equilax.Solution`][], its value $u$. To `stats` it adds `is_usable`: whether
    the backward pass would use the value. That is so if the solve is `successful`, and
    if it ended in `stagnation` at the level of rounding of the dtype.

    **Raises:**

    As [`equilax.fixed_point`][].

    Cost: that of the linear solver of the `adjoint`. Memory: the linearisation of `fn`
    and the linear solver's.
    """
    check_callable("fn", fn, "fn(y, args)")
    check_data(y=y, cotangent=cotangent, args=args, guess=guess)
    settings = Settings(
        solver,
        1,
        adjoint,
        batching,
        throw,
        state,
        None,
        has_aux=has_aux,
        tags=tags,
        batch_axis=batch_axis,
    )
    return adjoint_by(fn, y, cotangent, args, guess, settings)
