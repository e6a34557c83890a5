import equilax as eqlx
import jax
import jax.numpy as jnp
import pytest


_norms = {
    "max": (eqlx.max_norm, 4.0),
    "two": (eqlx.two_norm, 30**0.5),
    "rms": (eqlx.rms_norm, (30 / 4) ** 0.5),
}
norms = pytest.mark.parametrize(
    ("norm", "expected"), _norms.values(), ids=_norms.keys()
)


@norms
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_values_over_all_leaves_and_scales(norm, expected, scale):
    tree = (jnp.array([1.0, -2.0]), {"a": jnp.array([[3.0], [-4.0]])})
    tree = jax.tree.map(lambda x: (scale * x).astype(jnp.float32), tree)
    out = norm(tree)
    assert out.dtype == jnp.float32
    assert jnp.allclose(out / scale, expected, rtol=1e-6)


@norms
def test_complex_numbers_count_by_magnitude(norm, expected):
    tree = jnp.array([1.0, -2.0j, 3.0, 4.0j])
    assert jnp.allclose(norm(tree), expected)


@norms
def test_half_precision_is_reduced_in_single(norm, expected):
    tree = jnp.array([1.0, -2.0, 3.0, 4.0], jnp.bfloat16)
    assert norm(tree).dtype == jnp.float32
    assert jnp.allclose(norm(tree), expected, rtol=1e-6)


@norms
def test_not_a_number_is_never_lost(norm, expected):
    del expected
    assert jnp.isnan(norm((jnp.array([1.0]), jnp.array([jnp.nan, 2.0]))))
    assert jnp.isinf(norm((jnp.array([1.0]), jnp.array([jnp.inf, 2.0]))))


@norms
def test_empty_trees_and_leaves_have_norm_zero(norm, expected):
    assert norm(()) == 0
    assert norm(jnp.zeros((0, 3))) == 0
    tree = (jnp.zeros((0,)), jnp.array([1.0, -2.0, 3.0, -4.0]))
    assert jnp.allclose(norm(tree), expected)


@norms
def test_the_gradient_at_zero_is_zero(norm, expected):
    del expected
    assert jnp.all(jax.grad(norm)(jnp.zeros(3)) == 0)


def test_gradients_are_those_of_the_closed_form():
    x = jnp.array([1.0, -2.0, 2.0])
    assert jnp.allclose(jax.grad(eqlx.two_norm)(x), x / 3)
    assert jnp.allclose(jax.grad(eqlx.rms_norm)(x), x / 3 / 3**0.5)
    y = x * jnp.array([5.0, 1, 1])
    assert jnp.allclose(jax.grad(eqlx.max_norm)(y), jnp.array([1.0, 0, 0]))
