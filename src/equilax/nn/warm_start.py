from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._check import check_data, check_integer
from .._misc import struct, tree_allfinite, tree_where


class WarmStart(eqx.Module):
    """The last solution of each sample, kept as the start of its next solve.

    In an epoch of training most samples move little from where they were in the one
    before, so a solve that starts there takes fewer steps. It pays where the steps are
    many: with tight tolerances and slow samples. A solution that depends on its start
    is then one that depends on the history of training;
    [`equilax.equilibrium_signs`][] tells.

    Made, with the state that the solutions are kept in, by
    `warm, state = eqx.nn.make_with_state(eqlx.nn.WarmStart)(num_samples, like)`.

    Cost: a row of the table read and written a solve. Outside of a program that has
    been given the state to overwrite, as by `eqx.filter_jit(donate=...)`, writing
    copies the table. Memory: `num_samples` times `z`.
    """

    index: eqx.nn.StateIndex
    num_samples: int = eqx.field(static=True)

    def __init__(self, num_samples: int, like: PyTree[Any]):
        """**Arguments:**

        - `num_samples`: How many samples there are: their numbers are below it.
        - `like`: The state `z` of one of them, or its shapes and dtypes.
        """
        check_integer("num_samples", num_samples, 1)
        check_data(like=like)
        leaves = jtu.tree_leaves(like)
        is_typed = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        if not leaves or not all(map(is_typed, leaves)):
            raise TypeError(
                "`like` must be a tree of at least one array, or of its shapes and "
                f"dtypes; got {like!r}."
            )
        empty = lambda x: jnp.zeros((num_samples, *x.shape), x.dtype)
        is_known = jnp.zeros((num_samples,), bool)
        self.index = eqx.nn.StateIndex((jtu.tree_map(empty, like), is_known))
        self.num_samples = num_samples

    def start(
        self, sample: Int[Array, ""], state: eqx.nn.State, default: PyTree[Array]
    ) -> PyTree[Array]:
        """Where to start the solve of one sample. Under `jax.vmap` those of a batch.

        **Arguments:**

        - `sample`: The number of the sample.
        - `state`: The state, the same for a batch.
        - `default`: The start of a sample without a solution, such as
            `layer.cell.init(x)`. One whose number is out of range has none.

        **Returns:**

        A tree like `default`, for the `z0` of a layer.
        """
        table, is_known = state.get(self.index)
        _check_integers("sample", sample, ())
        _check_rows("default", default, table, ())
        row = jnp.clip(sample, 0, self.num_samples - 1)
        is_seen = is_known[row] & (sample == row)
        found = jtu.tree_map(lambda x: x[row], table)
        return tree_where(is_seen, found, default)

    def keep(
        self,
        samples: Int[Array, " batch"],
        solutions: PyTree[Array],
        state: eqx.nn.State,
    ) -> eqx.nn.State:
        """Keep the solutions of a batch. Outside of `jax.vmap`.

        **Arguments:**

        - `samples`: The numbers of the samples, all different. What is out of range is
            not kept: -1 for padding, or for a solve that failed.
        - `solutions`: Their solutions, along the first axis. One that is not finite is
            not kept.
        - `state`: The state.

        **Returns:**

        The new state. What is kept has no derivative.
        """
        table, is_known = state.get(self.index)
        _check_integers("samples", samples, (None,))
        _check_rows("solutions", solutions, table, samples.shape)
        is_kept = jax.vmap(tree_allfinite)(solutions)
        is_kept = is_kept & (samples >= 0) & (samples < self.num_samples)
        rows = jnp.where(is_kept, samples, self.num_samples)
        write = lambda old, new: old.at[rows].set(new, mode="drop")
        table = jtu.tree_map(write, table, lax.stop_gradient(solutions))
        return state.set(self.index, (table, is_known.at[rows].set(True, mode="drop")))


def _check_integers(name: str, value: Any, shape: tuple[int | None, ...]):
    """Refuse what is no integer, or no vector of them."""
    dtype, ndim = jnp.result_type(value), jnp.ndim(value)
    if not jnp.issubdtype(dtype, jnp.integer) or ndim != len(shape):
        form = "a vector of integers, one for each sample" if shape else "one integer"
        raise ValueError(
            f"`{name}` must be {form}; got an array of {dtype}{list(jnp.shape(value))}."
        )


def _check_rows(name: str, value: PyTree[Any], table: PyTree[Array], shape):
    """Refuse what is not like rows of the table, with axes of `shape` in front."""
    row = lambda x: jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype)
    expected = jtu.tree_map(row, table)
    got = struct(jtu.tree_map(jnp.asarray, value))
    if not eqx.tree_equal(got, expected):
        raise ValueError(
            f"`{name}` must have the structure, shapes and dtypes of what is kept; got "
            f"{got}, expected {expected}."
        )
