"""From what a user hands in to a function and a state that a loop can run."""

from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._custom_types import Y
from ._mesh import all_vary, any_varying
from ._misc import hoist, Hoisted


class ValueOf(eqx.Module, Generic[Y]):
    """The value of a function that returns `(value, aux)`."""

    fn: Hoisted

    def __call__(self, y, args):
        return self.fn(y, args)[0]


def as_state(y0: PyTree[Any], name: str = "y0") -> PyTree[Any]:
    """`y0` as a tree of strongly typed inexact arrays, or an error that says why."""
    leaves = jtu.tree_leaves(y0)
    if not leaves:
        raise ValueError(
            f"`{name}` must have at least one array; got the empty structure {y0!r}."
        )

    def convert(x):
        if not eqx.is_array_like(x):
            raise TypeError(
                f"`{name}` must be a pytree of floating-point or complex arrays; got a "
                f"leaf {x!r} of type {type(x).__name__}."
            )
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(
                f"`{name}` must be a pytree of floating-point or complex arrays; got a "
                f"leaf of dtype {x.dtype}. Convert it, as in "
                f"`{name}.astype(jnp.float32)`."
            )
        return jax.lax.convert_element_type(x, x.dtype)  # No longer weakly typed.

    return jtu.tree_map(convert, y0)


def _split(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            "`fn` must return a pair `(y, aux)` with `has_aux=True`; got an output of "
            f"type {type(out).__name__}."
        )
    return out


def _check_same(subject: str, verb: str, like: str, got: Any, expected: Any):
    """Compare with `expected`: structure, then shape and dtype by leaf."""
    a, b = jtu.tree_structure(got), jtu.tree_structure(expected)
    if a != b:
        raise ValueError(
            f"{subject} must {verb} the structure of {like}; got\n"
            f"  {a}\nexpected\n  {b}."
        )
    for (path, b), a in zip(
        jtu.tree_leaves_with_path(expected), jtu.tree_leaves(got), strict=True
    ):
        a = jnp.asarray(a)
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            where = jtu.keystr(path)
            raise ValueError(
                f"{subject} must {verb} the shapes and dtypes of {like}; got "
                f"{a.dtype}{list(a.shape)}, expected {b.dtype}{list(b.shape)}"
                f"{f' in the leaf at {where}' if where else ''}."
            )


def _as_leaf(name: str, x: Any, dtype: Any) -> Array:
    if not eqx.is_array_like(x):
        raise TypeError(
            f"`{name}` must have arrays or numbers where `y` has; got a leaf {x!r} of "
            f"type {type(x).__name__}."
        )
    # A number of Python's has no dtype of its own.
    is_plain = not hasattr(x, "dtype")
    if (
        is_plain
        and isinstance(x, complex)
        and not jnp.issubdtype(dtype, jnp.complexfloating)
    ):
        raise TypeError(f"`{name}` must be real where `y` is; got {x!r}.")
    return jnp.asarray(x, dtype) if is_plain else jnp.asarray(x)


def check_like(name: str, tree: PyTree[Any], y: PyTree[Array]) -> PyTree[Array]:
    """`tree` as arrays, or an error if it is no tree like `y`."""
    if jtu.tree_structure(tree) == jtu.tree_structure(y):
        tree = jtu.tree_map(lambda x, a: _as_leaf(name, x, a.dtype), tree, y)
    _check_same(f"`{name}`", "have", "`y`", tree, y)
    return tree


def check_batch(y0: PyTree[Array], axis: int | None) -> None:
    """Refuse a `y0` that has no batch along `axis`."""
    if axis is None:
        return
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(f"`batch_axis` must be an integer or `None`; got {axis!r}.")
    shapes = [x.shape for x in jtu.tree_leaves(y0)]
    if not all(-len(shape) <= axis < len(shape) for shape in shapes):
        raise ValueError(
            f"`batch_axis={axis}` must be an axis of every leaf of `y0`; got leaves of "
            f"the shapes {shapes}."
        )
    if len({shape[axis] for shape in shapes}) > 1:
        raise ValueError(
            f"`y0` must have one size along `batch_axis={axis}`; got the shapes "
            f"{shapes}."
        )


def move(tree: PyTree[Array], source: int | None, target: int | None) -> PyTree[Array]:
    """Move the batch axis of every leaf. `None` stands for no batch."""
    if source is None or target is None or source == target:
        return tree
    return jtu.tree_map(lambda x: jnp.moveaxis(x, source, target), tree)


def trace(
    fn, y0, args, has_aux: bool, batch_axis: int | None, name: str = "y0"
) -> tuple[Hoisted, PyTree[Any]]:
    """Trace `fn` once, at a `y0` that varies over the mesh axes of its image.

    In what is returned the batch, if there is one, is along the first axis. `name` is
    that of `y0` in errors.
    """
    y0 = move(y0, batch_axis, 0)
    found: list[frozenset[str]] = []

    def checked(y, args):
        y = move(y, 0, batch_axis)
        f, aux = _split(fn(y, args), has_aux)
        _check_same("`fn`", "return", f"`{name}`", f, y)
        f = jtu.tree_map(lambda x, like: jnp.asarray(x, like.dtype), f, y)
        found.append(any_varying(f))
        return move(f, batch_axis, 0), aux

    axes = any_varying(y0)
    while True:
        # All leaves alike: of one that did not vary the products with a transposed
        # Jacobian would be summed over devices which need not take the same steps.
        y0 = all_vary(y0, axes)
        hoisted = hoist(checked, y0, args)
        if found[-1] <= axes:
            return hoisted, y0
        axes = axes | found[-1]
