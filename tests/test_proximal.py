"""The proximal operators that belong to activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equilax.nn.proximal import proximal


def _bisect(activation, v, alpha):
    """The `z` for which `v` is in `z + alpha (s - z)` with `z = activation(s)`."""
    low, high = np.full_like(v, -1e6), np.full_like(v, 1e6)
    s = np.zeros_like(v)
    for _ in range(120):
        s = (low + high) / 2
        is_low = alpha * s + (1 - alpha) * activation(s) < v
        low, high = np.where(is_low, s, low), np.where(is_low, high, s)
    return activation(s)


@pytest.mark.parametrize(
    ("activation", "same"),
    [
        (jnp.tanh, np.tanh),
        (jax.nn.softplus, lambda s: np.logaddexp(s, 0)),
        (jnp.arctan, np.arctan),
        (jax.nn.relu, lambda s: np.maximum(s, 0)),
        (jax.nn.leaky_relu, lambda s: np.where(s > 0, s, 0.01 * s)),
    ],
    ids=["tanh", "softplus", "arctan", "relu", "leaky_relu"],
)
def test_it_solves_the_equation_and_so_does_its_derivative(activation, same):
    v = np.linspace(-9.01, 9, 41)

    @jax.jit
    def both(alpha):
        fn = lambda v: proximal(activation, v, alpha)
        return jax.jvp(fn, (jnp.asarray(v),), (jnp.ones(41),))

    for alpha in (1e-3, 0.3, 1.0, 4.0, 200.0):
        value, slope = both(jnp.asarray(alpha))
        exact = _bisect(same, v, alpha)
        assert np.max(np.abs(value - exact)) < 1e-9
        h = 1e-5
        nearby = _bisect(same, v + h, alpha) - _bisect(same, v - h, alpha)
        assert np.max(np.abs(slope - nearby / (2 * h))) < 1e-4
        # What makes a splitting contract.
        assert np.all((slope >= 0) & (slope <= 1 + 1e-12))
