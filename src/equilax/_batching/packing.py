"""The scalars of a loop's carry as one array."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree


_KINDS = [jnp.dtype(d) for d in (bool, jnp.int32, jnp.float32, jnp.float64)]


def _is_weak(x: Any) -> bool:
    return isinstance(x, bool | int | float | complex) or getattr(x, "weak_type", False)


def _is_packed(x: Any) -> bool:
    # What is weakly typed stays so, as a number of Python's does.
    return not _is_weak(x) and x.ndim == 0 and x.dtype in _KINDS


def _convert(x: Array, dtype: Any) -> Array:
    """To a word and back: between singles and integers the bits, else the value."""
    is_bits = {x.dtype, jnp.dtype(dtype)} == {*map(jnp.dtype, (jnp.int32, jnp.float32))}
    return lax.bitcast_convert_type(x, dtype) if is_bits else x.astype(dtype)


def _to_word(x: Any, dtype: Any, word: Any) -> Array:
    """**Arguments:**

    - `dtype`: What `x` was before the pass.
    """
    found = jnp.result_type(x)
    fits = found.kind == dtype.kind if _is_weak(x) else found == dtype
    if jnp.ndim(x) != 0 or not fits:
        raise TypeError(
            f"The carry of a loop must keep its types; a scalar of {dtype} became "
            f"{found}{list(jnp.shape(x))} in a pass over it."
        )
    return _convert(jnp.asarray(x, dtype), word)


def _joined(words: list[Array], dtype: Any) -> Array:
    """One array of all, in one kernel, where to concatenate them is one for each.

    By halves: to choose each of `n` numbers by a mask of its own is `n` times `n`
    operations, by whose count XLA decides whether a program is worth a thread.
    """
    if len(words) < 2:
        return words[0] if words else jnp.zeros(0, dtype)
    half = len(words) // 2
    low, high = _joined(words[:half], dtype), _joined(words[half:], dtype)
    # By a constant: what is computed here is moved out of the loop, as a kernel there.
    is_low = np.arange(len(words)) < half
    zero = jnp.zeros((), dtype)
    low = lax.pad(low, zero, [(0, len(words) - half, 0)])
    return jnp.where(is_low, low, lax.pad(high, zero, [(half, 0, 0)]))


def packing(
    example: PyTree[Any],
) -> tuple[Callable[[PyTree[Any]], PyTree[Array]], Callable[[PyTree[Array]], Any]]:
    """How to pack the scalars of a tree like `example` into one array, and back.

    A kernel writes one array, and a carry has a dozen scalars: each would take a kernel
    of its own, and most a copy besides. Where a problem is small these are all that a
    pass costs, and more: XLA runs a body of up to eight kernels one after the other on
    the CPU, and longer ones through its pool of threads, at several times the time.
    """
    leaves, treedef = jtu.tree_flatten(example)
    dtypes = {i: x.dtype for i, x in enumerate(leaves) if _is_packed(x)}
    word = jnp.int32
    if jnp.dtype(jnp.float64) in dtypes.values():
        # Their bits as integers are what XLA cannot compile for a TPU. But they hold
        # all integers of 32 bits; singles too, but for those that conversion flushes.
        word = jnp.float64
        dtypes = {i: d for i, d in dtypes.items() if d != jnp.float32}

    def pack(tree):
        leaves, found = jtu.tree_flatten(tree)
        if found != treedef:
            raise TypeError(
                "The carry of a loop must keep its structure; a pass over it made "
                f"{found} of {treedef}."
            )
        words = [_to_word(leaves[i], d, word)[None] for i, d in dtypes.items()]
        return _joined(words, word), [
            x for i, x in enumerate(leaves) if i not in dtypes
        ]

    def unpack(packed):
        words, rest = packed
        leaves = list(rest)
        for place, (i, dtype) in enumerate(dtypes.items()):
            x = lax.index_in_dim(words, place, keepdims=False)
            leaves.insert(i, _convert(x, dtype))
        return jtu.tree_unflatten(treedef, leaves)

    return pack, unpack
