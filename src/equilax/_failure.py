"""Errors for solves that failed, which speak of the whole batch."""

import dataclasses
import functools as ft
import math
from collections.abc import Sequence
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int, PyTree

from ._solution import RESULTS


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to fail: the name of its `RESULTS` item, and what to say of it.

    The name is empty where there is but one way, for which no item stands.
    """

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Messages:
    """All messages, each made when it is asked for.

    A message is chosen at run time by one integer, in which the lowest bits say which
    kinds there were, and the others count the solves that failed.
    """

    subject: str
    kinds: tuple[Kind, ...]
    advice: str
    num_solves: int

    def __len__(self) -> int:
        return (self.num_solves + 1) << len(self.kinds)

    def __getitem__(self, index: int) -> str:
        count, bits = divmod(index, 1 << len(self.kinds))
        found = [kind for i, kind in enumerate(self.kinds) if bits >> i & 1]
        if self.num_solves == 1:
            head = f"{self.subject} failed."
        else:
            head = f"{self.subject} failed for {count} of {self.num_solves} samples."
        names = [f"`{kind.name}`: " if kind.name else "" for kind in found]
        reasons = [n + kind.reason for n, kind in zip(names, found, strict=True)]
        return "\n".join([head, *reasons, self.advice])


def _reporter(messages: _Messages):
    """A function of what failed, whose `vmap`s add up what the samples say."""

    as_sequence = cast(Sequence[str], messages)

    @custom_vmap
    def report(counts: Int[Array, " kinds"]) -> Array:
        weights = jnp.array([1 << i for i in range(len(messages.kinds))], jnp.int32)
        bits = jnp.sum(jnp.where(counts > 0, weights, 0), dtype=jnp.int32)
        count = jnp.sum(counts, dtype=jnp.int32)
        # Above some million failures the number would not fit.
        count = jnp.minimum(count, (1 << (30 - len(messages.kinds))) - 1)
        index = (count << len(messages.kinds)) + bits
        token = jnp.zeros((), jnp.float32)
        return eqx.branched_error_if(token, count > 0, index, as_sequence)

    @report.def_vmap
    def _(size, is_batched, counts):
        del is_batched  # There is but one, so it is.
        counts = jnp.sum(counts, axis=0, dtype=counts.dtype)
        num = messages.num_solves * size
        wider = dataclasses.replace(messages, num_solves=num)
        return _reporter(wider)(counts), False

    return report


def raise_if_failed(
    tree: PyTree[Any],
    result: RESULTS | None,
    is_failed: Bool[Array, "..."],
    *,
    subject: str,
    kinds: tuple[Kind, ...],
    advice: str,
    is_batch: bool = False,
) -> PyTree[Any]:
    """Return `tree`, or raise at run time if the solve, or one of its batch, failed.

    The error tells how many solves of the batch failed, and in which ways.

    **Arguments:**

    - `result`: How each ended, or `None` if there is but one of `kinds`.
    - `kinds`: The ways to fail. A result that is none of them counts as the last.
    - `is_batch`: Whether `result` and `is_failed` are those of a batch.
    """
    report = _reporter(_Messages(subject, kinds, advice, num_solves=1))

    def check(result, is_failed):
        flags = [result == getattr(RESULTS, kind.name) for kind in kinds[:-1]]
        is_other = jnp.logical_not(ft.reduce(jnp.logical_or, flags, False))
        found = jnp.stack([*flags, is_other]) & is_failed
        return report(found.astype(jnp.int32))

    if is_batch:
        token = jnp.sum(jax.vmap(check)(result, is_failed))
    else:
        token = check(result, is_failed)
    # What is returned must depend on the check, or the check would be optimised away.
    # Nothing is ever seen of this but an error, or with `EQX_ON_ERROR=nan` a NaN.
    is_void = jnp.isnan(token)
    factor = jnp.where(is_void, math.nan, 1)
    # Zero in any case, which the compiler does not know.
    zero = jnp.where(is_void, 0, token).astype(jnp.int32)

    def depend(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return x * factor.astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.bool_):
            return x | (zero != 0)
        return x + zero.astype(x.dtype)

    dynamic, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jtu.tree_map(depend, dynamic), static)
