"""What each device can do for the rows that it has, without a message."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array


def _rule(ranks: list[list[int]], is_row: list[list[bool]]) -> tuple[str, tuple]:
    """The rule of a function of rows, in the notation of `custom_partitioning`.

    Also the names of all axes but that one: no device may have a part of them.
    """
    others = []

    def axes(rank: int, is_row: bool) -> str:
        names = [f"a{len(others) + j}" for j in range(rank - is_row)]
        others.extend(names)
        return " ".join(["rows"] * is_row + names)

    sides = (map(axes, *side) for side in zip(ranks, is_row, strict=True))
    return " -> ".join(map(", ".join, sides)), tuple(others)


def by_rows(
    fn: Callable[..., tuple[Array, ...]],
    is_row: Sequence[bool],
    arrays: Sequence[Array],
    out: Sequence[jax.ShapeDtypeStruct],
) -> tuple[Array, ...]:
    """`fn(*arrays)`, by all devices between which the compiler has split rows.

    **Arguments:**

    - `fn`: Works on as many rows as it gets, each by itself.
    - `is_row`: For each of `arrays`, whether rows are along its first axis.
    - `out`: What `fn` returns, all of it with rows along the first axis.
    """

    def partition(mesh: Any, args: Any, found: Any):
        first = args[is_row.index(True)].sharding
        on = lambda x, is_row: NamedSharding(mesh, P(first.spec[0]) if is_row else P())
        results = tuple(on(x, True) for x in found)
        return mesh, fn, results, tuple(map(on, args, is_row))

    ranks = [[x.ndim for x in some] for some in (arrays, out)]
    rule, others = _rule(ranks, [list(is_row), [True] * len(out)])
    split = custom_partitioning(fn)
    split.def_partition(partition, sharding_rule=rule, need_replication_factors=others)
    return tuple(split(*arrays))
