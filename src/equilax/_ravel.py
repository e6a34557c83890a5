from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PyTree

from ._dtype import promote, real


def raveller(tree: PyTree[jax.ShapeDtypeStruct]) -> tuple[Callable, Callable]:
    """Functions from arrays of the structure `tree` to one real vector and back.

    Real, since the Jacobian of a function of complex numbers is linear over the reals
    only. One vector, since the transpose of `lax.custom_linear_solve` fails on a tree
    of which some leaf does not depend on the tangent.
    """
    leaves, treedef = jtu.tree_flatten(tree)
    is_complex = [jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves]
    reals = [real(x.dtype) for x in leaves]
    dtype = promote(*reals)

    def ravel(tree):
        parts = []
        for x, c in zip(jtu.tree_leaves(tree), is_complex, strict=True):
            parts += [jnp.real(x), jnp.imag(x)] if c else [x]
        return jnp.concatenate([x.reshape(-1).astype(dtype) for x in parts])

    def unravel(vector):
        parts, start = [], 0
        for leaf, c, part in zip(leaves, is_complex, reals, strict=True):
            pieces = []
            for _ in range(1 + c):
                piece = lax.slice_in_dim(vector, start, start + leaf.size)
                pieces.append(piece.reshape(leaf.shape).astype(part))
                start += leaf.size
            parts.append(lax.complex(*pieces) if c else pieces[0])
        return jtu.tree_unflatten(treedef, parts)

    return ravel, unravel
