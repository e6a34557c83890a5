"""Scalars of a carry as one array, and the loops that carry them so."""

import re

import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equilax._batching.packing import packing

from .hlo import program


_NUMBERS = [0.0, -0.0, 1.1, -1e-45, 5e-324, 3e38, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtypes", ["float32", "float64", "both"])
@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit], ids=["plain", "jit"])
def test_what_is_packed_comes_back_as_it_was(dtypes, transform):
    chosen = ["float32", "float64"] if dtypes == "both" else [dtypes]
    integers = [0, -1, 2**31 - 1, -(2**31), 2**24 + 1]
    tree = {
        "numbers": [jnp.asarray(x, d) for d in chosen for x in _NUMBERS],
        "integers": [jnp.asarray(x, jnp.int32) for x in integers],
        "flags": (jnp.array(True), jnp.array(False)),
        "arrays": jnp.arange(3.0),
        "others": [jnp.asarray(2, jnp.int8), jnp.asarray(0.5, jnp.bfloat16)],
    }
    pack, unpack = packing(tree)
    words, rest = pack(tree)
    # Singles beside doubles are not, as their smallest would be flushed to zero.
    assert words.shape == (9 + 7,)
    assert len(rest) == 3 + 9 * (dtypes == "both")
    found = transform(lambda tree: unpack(pack(tree)))(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_to_pack_is_few_operations():
    """By each in turn they would be 256, by halves 16 at each of four depths."""
    numbers = [jnp.int32(i) for i in range(16)]
    pack, _ = packing(numbers)
    cost = jax.jit(pack).lower(numbers).compile().cost_analysis()
    assert cost is not None
    assert cost["flops"] <= 64


def test_weakly_typed_scalars_stay_so():
    tree = (1.5, jnp.asarray(1.5), jnp.float32(2))
    pack, unpack = packing(tree)
    found = unpack(pack(tree))
    assert found == (1.5, 1.5, 2)
    assert isinstance(found[0], float)
    assert found[1].weak_type


@pytest.mark.parametrize("became", [jnp.float64(1), 1.5, jnp.ones(2, jnp.int32)])
def test_a_pass_that_changes_a_type_is_refused(became):
    pack, _ = packing(jnp.int32(1))
    with pytest.raises(TypeError, match="scalar of int32 became float|of int32.*int32"):
        pack(became)


def test_a_pass_that_changes_the_structure_is_refused():
    pack, _ = packing({"a": jnp.int32(1), "b": jnp.int32(2)})
    with pytest.raises(TypeError, match="keep its structure"):
        pack({"a": jnp.int32(1), "c": jnp.int32(2)})


_FREE = r" (get-tuple-element|parameter|tuple|constant|bitcast)\("


def _num_kernels(fn, *args):
    """How many kernels a pass of each loop runs."""
    found = program(fn, *args)
    bodies = (found.parts[name].split("\n")[1:-1] for name in found.loops())
    return [sum(not re.search(_FREE, line) for line in body) for body in bodies]


@pytest.mark.parametrize("norm", [eqlx.max_norm, eqlx.RelativeToNorm()])
def test_a_small_loop_runs_few_kernels(norm):
    """Eight, which is what XLA runs without its pool of threads; they were eighteen."""
    if jax.default_backend() != "cpu":
        pytest.skip("Of XLA's CPU backend.")
    solver = eqlx.FixedPointIteration(1e-8, 1e-8, norm=norm)
    linear = eqlx.FixedPointLinearSolver(solver)

    def loss(weight, x):
        fn = lambda z, x: weight @ z + x
        adjoint = eqlx.ImplicitAdjoint(linear)
        return jnp.sum(eqlx.fixed_point(fn, solver, x, x, adjoint=adjoint).value)

    found = _num_kernels(jax.grad(loss, (0, 1)), 0.1 * jnp.eye(20), jnp.ones(20))
    assert len(found) == 2
    assert max(found) <= 8
