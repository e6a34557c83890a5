import equilax_kernels
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax_kernels.max_residual import specs

from ..helpers import optimised_hlo


_RTOL, _ATOL = 1e-3, 1e-5


def _call(y, f, dtype=jnp.float64, rtol=_RTOL, atol=_ATOL):
    return equilax_kernels.max_residual(
        y, f, jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype)
    )


def _expected(y, f):
    y, f = np.asarray(y, np.complex128), np.asarray(f, np.complex128)
    moved = np.abs(f - y)
    scaled = moved / (_ATOL + _RTOL * np.abs(y))
    return [np.max(x, initial=0) for x in (moved, scaled, np.abs(y))]


@pytest.mark.parametrize("shape", specs.SHAPES)
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.complex64, jnp.float32),
        (jnp.complex128, jnp.float64),
    ],
)
def test_is_the_definition_in_float64(getkey, shape, dtype, wide):
    y, f = (jr.normal(getkey(), shape, dtype) for _ in range(2))
    out = _call(y, f, wide)
    assert all(x.dtype == wide and x.shape == () for x in out)
    # Some roundings of the operands, the difference and the quotient.
    assert np.allclose(out, _expected(y, f), rtol=8 * float(jnp.finfo(wide).eps))


@pytest.mark.parametrize("num", specs.BATCHES)
def test_a_batch_with_either_operand_shared(getkey, num):
    y, f = jr.normal(getkey(), (num, 5)), jr.normal(getkey(), (num, 5))
    expected = np.stack([_expected(a, b) for a, b in zip(y, f, strict=True)], axis=1)
    assert np.allclose(jax.vmap(_call)(y, f), expected)
    expected = np.stack([_expected(y[0], b) for b in f], axis=1)
    assert np.allclose(jax.vmap(_call, (None, 0))(y[0], f), expected)
    expected = np.stack([_expected(a, f[0]) for a in y], axis=1)
    assert np.allclose(jax.vmap(_call, (0, None))(y, f[0]), expected)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_seen(bad):
    y = jnp.zeros(9)
    residual, scaled, size = _call(y, y.at[4].set(bad))
    assert not jnp.isfinite(residual)
    assert not scaled < 1
    assert size == 0
    residual, scaled, _ = _call(y.at[4].set(bad), y.at[4].set(bad))
    assert jnp.isnan(residual)
    assert not scaled < 1


def test_what_does_not_move_is_converged_at_any_tolerance():
    y = jnp.array([0.0, 2.0])
    assert _call(y, y, rtol=0.0, atol=0.0)[1] == 0
    assert _call(y, y + 1e-9, rtol=0.0, atol=0.0)[1] == jnp.inf


def test_it_is_one_reduction():
    y = jnp.ones((16, 256), jnp.float32)
    run = jax.vmap(lambda y, f: _call(y, f, jnp.float32))
    assert optimised_hlo(run, y, y).count(" reduce(") == 1
