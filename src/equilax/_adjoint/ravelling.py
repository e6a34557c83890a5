from collections.abc import Callable

import equinox as eqx
import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._misc import struct
from .._ravel import raveller


class Ravelling(eqx.Module):
    """From a tree to one real vector and back, of a sample or of a batch of them."""

    ravel: Callable[[PyTree[Array]], Array] = eqx.field(static=True)
    unravel: Callable[[Array], PyTree[Array]] = eqx.field(static=True)


def ravelling_of(tree: PyTree[Array], is_batch: bool) -> Ravelling:
    if not is_batch:
        return Ravelling(*raveller(struct(tree)))
    sample = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
    return Ravelling(*map(jax.vmap, raveller(sample)))
