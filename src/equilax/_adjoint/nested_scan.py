"""A loop that can be backpropagated through, in scans within scans."""

import itertools
from collections.abc import Callable

import jax
from jax import lax

from .._batching import aligned, Carry
from .._custom_types import BoolScalar


_WIDTHS = range(3, 9)


def _shape(max_steps: int) -> tuple[int, int]:
    """The length and the number of scans that hold so many steps and few more."""
    least = lambda width: next(d for d in itertools.count(1) if width**d >= max_steps)
    return min(((w, least(w)) for w in _WIDTHS), key=lambda shape: shape[0] ** shape[1])


def nested_scan(
    cond: Callable[[Carry], BoolScalar],
    body: Callable[[Carry], Carry],
    init: Carry,
    *,
    max_steps: int,
    may_vary: frozenset[str],
) -> Carry:
    """Iterate `body` while `cond` holds, for up to `max_steps` steps.

    Scans of a few steps in scans of a few, each recomputed from its start on the way
    back. After the end `body` must return the carry unchanged, as a [`Loop`][] does: it
    is called all the same. (A `lax.cond` that skipped it would make what `fn` captures
    vary over the mesh axes of its predicate, which its trace does not expect.)

    Cost: `max_steps` times the levels of the scans and one, for which there is a
    logarithm of `max_steps`. Memory: their length for each level, in carries.
    """
    width, depth = _shape(max_steps)
    cond, body, init = aligned(cond, body, init, may_vary=may_vary)

    def run(level: int, carry: Carry) -> Carry:
        inner = body if level == 0 else jax.checkpoint(lambda c: run(level - 1, c))

        def step(carry, _):
            return inner(carry), None

        return lax.scan(step, carry, length=width)[0]

    return run(depth - 1, init)
