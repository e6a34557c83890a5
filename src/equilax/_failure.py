"""Errors for solves that failed, which speak of the whole batch."""

import dataclasses
import functools as ft
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._solution import RESULTS


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to fail: the name of its `RESULTS` item, and what to say of it.

    The name is empty where there is but one way, for which no item stands.
    """

    name: str
    reason: str


# A message is asked for as soon as it is made, but other threads may fail meanwhile.
_KEPT = 64


class _Messages(Sequence[str]):
    """The messages of the solves that have failed, made when that happened.

    Equinox chooses one of several messages by an integer, too small to hold what there
    is to say: so it is the number of one of these.
    """

    def __init__(self, subject: str, kinds: tuple[Kind, ...], advice: str):
        self.subject = subject
        self.kinds = kinds
        self.advice = advice
        self.numbers = itertools.count()
        self.made: dict[int, str] = {}

    def make(self, shape: tuple[int, ...], row: np.ndarray) -> np.ndarray:
        """The number of a new message, of the `row` of a [`_reporter`][]."""
        counts, (lane, num_steps, residual) = np.split(np.asarray(row), [-3])
        head, about = f"{self.subject} failed.", ""
        if num_steps >= 0:
            residual = residual.view(np.float32)
            about = f"after {num_steps} steps, with a residual of {residual:.3g}"
        if shape:
            num = np.sum(counts)
            head = f"{head[:-1]} for {num} of {math.prod(shape)} samples."
            where = np.unravel_index(lane, shape)
            sample = where[0] if len(shape) == 1 else tuple(map(int, where))
            about = f"the first is sample {sample}{about and ', '}{about}"
        found = [kind for kind, num in zip(self.kinds, counts, strict=True) if num]
        names = [f"`{kind.name}`: " if kind.name else "" for kind in found]
        reasons = [n + kind.reason for n, kind in zip(names, found, strict=True)]
        about = about and f"{about[0].upper()}{about[1:]}."
        number = next(self.numbers) % 2**30
        lines = [head, *reasons, about, self.advice]
        self.made[number] = "\n".join(line for line in lines if line)
        self.made.pop(number - _KEPT, None)
        return np.asarray(number, np.int32)

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index):
        return self.made[index]


# What was traced earlier with these words goes on with what is here.
@ft.cache
def _messages(subject: str, kinds: tuple[Kind, ...], advice: str) -> _Messages:
    return _Messages(subject, kinds, advice)


def _as_row(found: Bool[Array, " kinds"], num_steps, residual) -> Int[Array, " n"]:
    """Which kinds there were, in which sample, and its figures bit by bit.

    Integers alone, through which no derivative comes.
    """
    figures = [jnp.asarray(-1, jnp.int32), jnp.asarray(0, jnp.int32)]
    if num_steps is not None:
        bits = lax.stop_gradient(residual).astype(jnp.float32)
        figures = [num_steps, lax.bitcast_convert_type(bits, jnp.int32)]
    lane = jnp.zeros((), jnp.int32)
    parts = [lane, *(x.astype(jnp.int32) for x in figures)]
    return jnp.concatenate([found.astype(jnp.int32), jnp.stack(parts)])


def _joined(rows: Int[Array, "batch n"], num_below: int) -> Int[Array, " n"]:
    """One row for a batch of them: sums of counts, and the first that failed."""
    if rows.shape[0] == 0:
        return jnp.zeros(rows.shape[1:], jnp.int32)
    counts, figures = rows[:, :-3], rows[:, -3:]
    is_failed = jnp.any(counts > 0, axis=1)
    first = jnp.argmax(is_failed)
    # By a sum, which partitions as that of the counts does.
    is_first = jnp.arange(rows.shape[0]) == first
    of_first = jnp.sum(
        jnp.where(is_first[:, None], figures, 0), axis=0, dtype=jnp.int32
    )
    lane = of_first[:1] + first.astype(jnp.int32) * num_below
    counts = jnp.sum(counts, axis=0, dtype=jnp.int32)
    return jnp.concatenate([counts, lane, of_first[1:]])


def _reporter(messages: _Messages, shape: tuple[int, ...] = ()):
    """A function of what failed, whose `vmap`s join what the samples say.

    **Arguments:**

    - `shape`: The sizes of the batches that it is called on.
    """

    @custom_vmap
    def report(row: Int[Array, " n"]) -> Array:
        is_failed = jnp.any(row[:-3] > 0)
        make = ft.partial(messages.make, shape)
        number = jnp.zeros((), jnp.int32)
        if os.environ.get("EQX_ON_ERROR") not in ("nan", "off"):
            number = lax.cond(
                is_failed,
                lambda row: jax.pure_callback(make, number, row),
                lambda row: number,
                row,
            )
        token = jnp.zeros((), jnp.float32)
        return eqx.branched_error_if(token, is_failed, number, messages)

    @report.def_vmap
    def _(size, is_batched, row):
        del is_batched  # There is but one, so it is.
        joined = _joined(row, math.prod(shape))
        return _reporter(messages, (size, *shape))(joined), False

    return report


def raise_if_failed(
    tree: PyTree[Any],
    result: RESULTS | None,
    is_failed: Bool[Array, "..."],
    *,
    subject: str,
    kinds: tuple[Kind, ...],
    advice: str,
    num_steps: Int[Array, "..."] | None = None,
    residual: Float[Array, "..."] | None = None,
    is_batch: bool = False,
) -> PyTree[Any]:
    """Return `tree`, or raise at run time if the solve, or one of its batch, failed.

    The error tells how many solves of the batch failed and in which ways, and of the
    first of them which it is, and its steps and residual.

    **Arguments:**

    - `result`: How each ended, or `None` if there is but one of `kinds`.
    - `kinds`: The ways to fail. A result that is none of them counts as the last.
    - `is_batch`: Whether `result` and `is_failed` are those of a batch.
    """
    report = _reporter(_messages(subject, kinds, advice))

    def check(result, is_failed, num_steps, residual):
        flags = [result == getattr(RESULTS, kind.name) for kind in kinds[:-1]]
        is_other = jnp.logical_not(ft.reduce(jnp.logical_or, flags, False))
        found = jnp.stack([*flags, is_other]) & is_failed
        return report(_as_row(found, num_steps, residual))

    ended = (result, is_failed, num_steps, residual)
    token = jnp.sum(jax.vmap(check)(*ended)) if is_batch else check(*ended)
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
