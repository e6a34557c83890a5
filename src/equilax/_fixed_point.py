from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._adjoint import AbstractAdjoint, ImplicitAdjoint, Problem
from ._batching import AbstractBatching, Staged
from ._check import check_callable, check_instance, check_integer
from ._custom_types import Args, Aux, MaybeAuxFn, Y
from ._failure import Kind, raise_if_failed
from ._misc import any_varying, hoist, Hoisted, vary_over, varying
from ._solution import RESULTS, Solution
from ._solver import AbstractFixedPointSolver, iterate


_KINDS = tuple(
    Kind(name, RESULTS[getattr(RESULTS, name)])
    for name in ("max_steps_reached", "stagnation", "divergence", "nonfinite")
)


class _First(eqx.Module, Generic[Y]):
    """The value of a function that returns `(value, aux)`."""

    fn: Hoisted

    def __call__(self, y, args):
        return self.fn(y, args)[0]


def _as_state(y0: PyTree[Any]) -> PyTree[Any]:
    """`y0` as a tree of strongly typed inexact arrays, or an error that says why."""
    leaves = jtu.tree_leaves(y0)
    if not leaves:
        raise ValueError(
            f"`y0` must have at least one array; got the empty structure {y0!r}."
        )

    def convert(x):
        if not eqx.is_array_like(x):
            raise TypeError(
                "`y0` must be a pytree of floating-point or complex arrays; got a leaf "
                f"{x!r} of type {type(x).__name__}."
            )
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                "`y0` must be a pytree of floating-point or complex arrays; got a leaf "
                f"of dtype {x.dtype}. Convert it, as in `y0.astype(jnp.float32)`."
            )
        return jax.lax.convert_element_type(x, x.dtype)  # No longer weakly typed.

    return jtu.tree_map(convert, y0)


def _check_call(fn, solver, max_steps, adjoint, batching, throw):
    check_callable("fn", fn, "fn(y, args)")
    check_instance("solver", solver, AbstractFixedPointSolver)
    check_instance("adjoint", adjoint, AbstractAdjoint)
    check_instance("batching", batching, AbstractBatching)
    check_instance("throw", throw, bool)
    check_integer("max_steps", max_steps, 1)


def _split(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            "`fn` must return a pair `(y, aux)` with `has_aux=True`; got an output of "
            f"type {type(out).__name__}."
        )
    return out


def _check_output(y0, f):
    """Compare what `fn` returns with `y0`: structure, then shape and dtype by leaf."""
    got, expected = jtu.tree_structure(f), jtu.tree_structure(y0)
    if got != expected:
        raise ValueError(
            "`fn` must return the structure of `y0`; got\n"
            f"  {got}\nexpected\n  {expected}."
        )
    for (path, a), b in zip(
        jtu.tree_leaves_with_path(y0), jtu.tree_leaves(f), strict=True
    ):
        b = jnp.asarray(b)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            where = jtu.keystr(path)
            raise ValueError(
                "`fn` must return the shapes and dtypes of `y0`; got "
                f"{b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}"
                f"{f' in the leaf at {where}' if where else ''}."
            )


def _hoist(fn, y0, args, has_aux: bool) -> tuple[Hoisted, PyTree[Any]]:
    """Trace `fn` once, at a `y0` that varies over the mesh axes of its image."""

    def checked(y, args):
        f, aux = _split(fn(y, args), has_aux)
        _check_output(y0, f)
        f = jtu.tree_map(lambda x, like: jnp.asarray(x, like.dtype), f, y)
        axes.append([varying(x) for x in jtu.tree_leaves(f)])
        return f, aux

    while True:
        axes: list[list[frozenset[str]]] = []
        hoisted = hoist(checked, y0, args)
        leaves, treedef = jtu.tree_flatten(y0)
        new = [vary_over(x, a) for x, a in zip(leaves, axes[-1], strict=True)]
        if all(varying(x) == varying(n) for x, n in zip(leaves, new, strict=True)):
            return hoisted, y0
        y0 = jtu.tree_unflatten(treedef, new)


def _check_axis_names(hoisted: Hoisted, batching: AbstractBatching):
    """Refuse collectives over a vmapped axis, which a batch of our own has not."""
    # These are effects of a trace, each with the `name` of its axis.
    names = {getattr(effect, "name", None) for effect in hoisted.jaxpr.effects}
    names -= {None, *jax.sharding.get_abstract_mesh().manual_axes}
    if names and not batching.serves_axis_names:
        raise ValueError(
            f"`batching={type(batching).__name__}()` cannot serve an `fn` with a "
            f"collective over a vmapped axis, here {sorted(map(str, names))}: take "
            "`batching=equilax.Vmapped()`."
        )


def _raise_on_failure(sol: Solution) -> Solution:
    if any_varying(sol):
        raise ValueError(
            "`throw=True` cannot raise from inside `jax.shard_map`: pass `throw=False` "
            "and read `Solution.result`, which holds the outcome of every sample."
        )
    return raise_if_failed(
        sol,
        sol.result,
        sol.result != RESULTS.successful,
        subject="The fixed-point solve",
        kinds=_KINDS,
        advice="`throw=False` returns the outcome in `Solution.result` instead.",
    )


@eqx.filter_jit
def _fixed_point(
    fn, solver, y0, args, has_aux, max_steps, adjoint, batching, throw, tags
) -> Solution:
    hoisted, state0 = _hoist(fn, _as_state(y0), args, has_aux)
    _check_axis_names(hoisted, batching)

    def solve(problem, run):
        return iterate(
            problem.fn,
            problem.solver,
            problem.y0,
            problem.args,
            max_steps=problem.max_steps,
            run=run,
        )

    problem = Problem(
        _First(hoisted), solver, state0, args, batching, tags, max_steps, throw
    )
    end = adjoint.apply(solve, problem)
    is_successful = end.result == RESULTS.successful
    value, residual, stats = solver.postprocess(
        end.y, end.residual, is_successful, end.state
    )
    # The derivative of `aux` runs through `value` and through `fn` here.
    aux = hoisted(value, args)[1] if has_aux else None
    stats = {
        "num_steps": end.num_steps,
        "num_fn_evals": end.num_fn_evals + int(has_aux),
        "max_steps": max_steps,
        "residual": residual,
        **stats,
    }
    sol = Solution(value, end.result, aux, stats, end.state)
    return _raise_on_failure(sol) if throw else sol


def fixed_point(
    fn: MaybeAuxFn[Y, Aux],
    solver: AbstractFixedPointSolver,
    y0: Y,
    args: Args = None,
    *,
    has_aux: bool = False,
    max_steps: int = 256,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),  # noqa: B008
    batching: AbstractBatching = Staged(),  # noqa: B008
    throw: bool = True,
    tags: frozenset[object] = frozenset(),
) -> Solution[Y, Aux]:
    r"""Find a `y` such that `fn(y, args) == y`.

    Converged means $\| (f(y) - y) / (\mathrm{atol} + \mathrm{rtol} |y|) \| < 1$ in the
    solver's norm, at the `y` that is returned.

    Under `jax.vmap`, nested or not, all samples run as one batch, and each has its own
    status, step count and residual. A finished sample is frozen, and none can change
    the value of another, be it slow, divergent or not-a-number.

    **Arguments:**

    - `fn`: Maps `(y, args)` to a pytree with the structure, shapes and dtypes of `y`.
        Any callable; derivatives reach `args` and whatever it closes over. Traced once.
    - `solver`: A fixed-point solver, such as [`equilax.Anderson`][].
    - `y0`: The initial guess: a pytree of floating-point or complex arrays.
    - `args`: Passed to `fn`. Any pytree; what is not an array stays as it is.
    - `has_aux`: If `True` then `fn` returns a pair `(y, aux)`. Keyword only argument.
    - `max_steps`: The most steps to take. Keyword only argument.
    - `adjoint`: How to differentiate the solve. Keyword only argument.
    - `batching`: How the solve runs under `jax.vmap`. Keyword only argument.
    - `throw`: Whether a failed solve raises. If not, `Solution.result` says how it
        ended. With `throw=False` the compiled program holds no host callback. Keyword
        only argument.
    - `tags`: Lineax tags that the Jacobian of `y - fn(y, args)` with respect to `y`
        has, for a Lineax solver of the adjoint. Keyword only argument.

    **Returns:**

    An [`equilax.Solution`][].

    **Raises:**

    - `ValueError` or `TypeError`: At trace time, for a wrong call.
    - `EquinoxRuntimeError`: At run time, if the solve fails and `throw` is `True`.

    Cost: an evaluation of `fn` more than the solver takes steps, and another one for
    `aux`. Memory: that of the solver, and twice `y`.
    """
    _check_call(fn, solver, max_steps, adjoint, batching, throw)
    return _fixed_point(
        fn, solver, y0, args, has_aux, int(max_steps), adjoint, batching, throw, tags
    )
