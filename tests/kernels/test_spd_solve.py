import equilax_kernels
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax_kernels.spd_solve import specs

from ..helpers import optimised_hlo


@pytest.mark.parametrize("size", specs.SIZES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_matches_a_float64_library(getkey, size, dtype):
    root = jr.normal(getkey(), (size, size), jnp.float64)
    matrix = root @ root.T + jnp.eye(size)
    vector = jr.normal(getkey(), (size,), jnp.float64)
    expected = np.linalg.solve(np.asarray(matrix), np.asarray(vector))
    floor = jnp.zeros((), dtype)
    out = equilax_kernels.spd_solve(matrix.astype(dtype), vector.astype(dtype), floor)
    assert out.dtype == dtype
    # Backward stable: the error is the condition number times the rounding.
    bound = 10 * size * np.linalg.cond(matrix) * float(jnp.finfo(dtype).eps)
    assert np.max(np.abs(np.asarray(out) - expected)) < bound * np.max(np.abs(expected))


@pytest.mark.parametrize("num", specs.BATCHES)
def test_a_batch_is_solved_without_a_library_call(getkey, num):
    root = jr.normal(getkey(), (num, 5, 5))
    matrix = root @ root.mT + jnp.eye(5)[None]
    vector = jr.normal(getkey(), (num, 5))
    solve = jax.jit(jax.vmap(equilax_kernels.spd_solve, in_axes=(0, 0, None)))
    out = solve(matrix, vector, jnp.zeros(()))
    assert jnp.allclose(jnp.einsum("bij,bj->bi", matrix, out), vector)
    text = optimised_hlo(solve, matrix, vector, jnp.zeros(()))
    assert "custom-call" not in text


def test_a_direction_without_information_takes_no_part():
    matrix = jnp.ones((3, 3)) + jnp.diag(jnp.array([0.0, 0.0, 1.0]))
    vector = jnp.array([2.0, 2.0, 3.0])
    out = equilax_kernels.spd_solve(matrix, vector, jnp.array(1e-12))
    assert jnp.allclose(out, jnp.array([1.0, 0.0, 1.0]))
    zero = equilax_kernels.spd_solve(jnp.zeros((2, 2)), jnp.ones(2), jnp.array(0.0))
    assert jnp.all(zero == 0)
