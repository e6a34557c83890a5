import abc
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree


class AbstractParametrisation(eqx.Module):
    """Abstract base class for a part of a model that is made of others once a solve.

    A weight that is normalised, say. It may stand wherever what it makes would: see
    [`equilax.nn.prepare`][].
    """

    @abc.abstractmethod
    def prepare(self) -> Any:
        """What it stands for."""


class AbstractStatefulParametrisation(eqx.Module):
    """As [`equilax.nn.AbstractParametrisation`][], with something to remember.

    It is prepared by [`equilax.nn.prepare_with_state`][].
    """

    @abc.abstractmethod
    def prepare(self, state: eqx.nn.State) -> tuple[Any, eqx.nn.State]:
        """What it stands for, and the new state."""


_Any = AbstractParametrisation | AbstractStatefulParametrisation


def _split(tree: PyTree[Any], top: Any) -> tuple[list[Any], Any]:
    is_leaf = lambda x: x is not top and isinstance(x, _Any)
    return jtu.tree_flatten(tree, is_leaf=is_leaf)


def _prepare(
    tree: PyTree[Any], state: eqx.nn.State | None
) -> tuple[PyTree[Any], eqx.nn.State | None]:
    """The inner ones first, where one is made of others."""
    leaves, structure = _split(tree, tree)
    made = []
    for leaf in leaves:
        if isinstance(leaf, _Any):
            leaf, state = _prepare(leaf, state)
        made.append(leaf)
    tree = jtu.tree_unflatten(structure, made)
    if isinstance(tree, AbstractParametrisation):
        return tree.prepare(), state
    if isinstance(tree, AbstractStatefulParametrisation):
        if state is None:
            raise ValueError(
                f"A `{type(tree).__name__}` has a state, which is not at hand here: "
                "prepare the model by `model, state = equilax.nn.prepare_with_state("
                "model, state)` before it is called."
            )
        return tree.prepare(state)
    return tree, state


def prepare(tree: PyTree[Any]) -> PyTree[Any]:
    """Put what each parametrisation stands for in its place.

    An [`equilax.nn.FixedPointLayer`][] does so with its cell, once a solve of a whole
    batch, ahead of the first step. So the cell of a layer may have an
    [`equilax.nn.WeightNorm`][] where it has a weight, and no evaluation normalises
    anything. Gradients go through.

    **Arguments:**

    - `tree`: A model, a cell, or any part of one.

    **Returns:**

    The tree without parametrisations.

    **Raises:**

    `ValueError` for a parametrisation that has a state: see
    [`equilax.nn.prepare_with_state`][].
    """
    return _prepare(tree, None)[0]


def prepare_with_state(
    tree: PyTree[Any], state: eqx.nn.State
) -> tuple[PyTree[Any], eqx.nn.State]:
    """As [`equilax.nn.prepare`][], for a model with parametrisations that have a state.

    Called on the whole model, inside the function that is differentiated and outside of
    `jax.vmap`: once for a batch.

    **Arguments:**

    - `tree`: A model, or any part of one.
    - `state`: The state, as made by `equinox.nn.make_with_state`.

    **Returns:**

    The model without parametrisations, and the new state.
    """
    if not isinstance(state, eqx.nn.State):
        raise TypeError(
            "`state` must be an `equinox.nn.State`, as `equinox.nn.make_with_state` "
            f"makes it; got {type(state).__name__}."
        )
    tree, new = _prepare(tree, state)
    assert new is not None
    return tree, new
