"""Along which axes the parts of a problem are one solve, and along which not."""

from jaxtyping import Array, PyTree

from ._batching import AbstractBatching, Vmapped
from ._mesh import any_varying, as_names, is_checked, manual_axes
from ._misc import Hoisted
from ._solver import AbstractFixedPointSolver


def check_axis_names(
    hoisted: Hoisted,
    solver: AbstractFixedPointSolver,
    y0: PyTree[Array],
    batching: AbstractBatching,
) -> AbstractBatching:
    """Refuse collectives along axes along which solves end one by one.

    **Returns:**

    `batching`, which knows of the vmapped axes along which there are collectives.
    """
    # These are effects of a trace, each with the `name` of its axis.
    effects = (getattr(effect, "name", None) for effect in hoisted.jaxpr.effects)
    found = {str(name) for name in effects if name is not None}
    split, manual = set(as_names(solver.axis_name)), manual_axes()
    vmapped = sorted(found - manual)
    if vmapped and not batching.serves_axis_names:
        raise ValueError(
            f"`batching={type(batching).__name__}()` cannot serve an `fn` with a "
            f"collective over a vmapped axis, here {vmapped}: take "
            "`batching=equilax.Vmapped()`."
        )
    unknown = sorted(split - manual)
    if unknown and not batching.serves_axis_names:
        raise ValueError(
            "`axis_name` must name axes of the mesh of a `jax.shard_map` around the "
            f"solve; got {unknown}, expected some of {sorted(manual)}."
        )
    moving = any_varying(y0, solver)
    for name in sorted(split & manual):
        if is_checked(name) and name not in moving:
            raise ValueError(
                f"`axis_name={solver.axis_name!r}` must name axes along which `y0` is "
                f"split; along {name!r} it is the same on all devices."
            )
    for name in sorted((found & manual) - split):
        # Where nothing moves apart all devices stop together.
        if name in moving or not is_checked(name):
            raise ValueError(
                f"`fn` has a collective over the mesh axis {name!r}, along which each "
                "device ends its own solve, and would leave the others waiting. If "
                f"`y` is split along it, give the solver `axis_name={name!r}`, which "
                "makes one solve of the parts. If parameters are, gather them before "
                "the solve."
            )
    return Vmapped(frozenset(vmapped)) if vmapped else batching
