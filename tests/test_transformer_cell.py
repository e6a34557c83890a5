"""The attention block, its masks and its dropout."""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest


nn = eqlx.nn
_SOLVER = eqlx.Anderson(0.0, 1e-12)


def _rotary(size=4):
    return eqx.nn.RotaryPositionalEmbedding(size)


def _normalise(h):
    mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return (h - mean) / np.sqrt(variance + 1e-5)


def _turned(heads):
    """Pairs of features as complex numbers, turned by position times frequency."""
    length, _, size = heads.shape
    half = size // 2
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    pairs = heads[..., :half] + 1j * heads[..., half:]
    pairs = pairs * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _attention(cell, h, mask):
    length, heads = h.shape[0], cell.attention.num_heads
    project = lambda p: (h @ np.asarray(p.weight).T).reshape(length, heads, -1)
    q, k, v = (
        project(getattr(cell.attention, f"{n}_proj")) for n in ("query", "key", "value")
    )
    if cell.position is not None:
        q, k = _turned(q), _turned(k)
    out = np.zeros_like(v)
    for i in range(length):
        seen = np.flatnonzero(mask[i])
        for head in range(heads if seen.size else 0):
            weights = np.exp(k[seen, head] @ q[i, head] / np.sqrt(q.shape[-1]))
            out[i, head] = weights @ v[seen, head] / weights.sum()
    return out.reshape(length, -1) @ np.asarray(cell.attention.output_proj.weight).T


def _perceptron(cell, h, activation):
    linear = lambda layer, h: h @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    return linear(cell.output, np.asarray(activation(linear(cell.hidden, h))))


def _block(cell, z, x, mask, activation=np.tanh):
    """The formulas of the docstring, position by position."""
    z, x = np.asarray(z), np.asarray(x)
    if cell.causal:
        mask = mask & np.tri(len(x), dtype=bool)
    injection = np.asarray(cell.injection.weight), np.asarray(cell.injection.bias)
    injected = _normalise(x @ injection[0].T + injection[1])
    if cell.pre_norm:
        attended = _attention(cell, _normalise(z), mask)
        thought = _perceptron(cell, _normalise(z + attended), activation)
        return injected + attended + thought
    h = z + injected
    h = _normalise(h + _attention(cell, h, mask))
    return _normalise(h + _perceptron(cell, h, activation))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_block_is_what_it_says(getkey, pre_norm, causal):
    position = _rotary() if causal else None
    options = {"pre_norm": pre_norm, "causal": causal, "position": position}
    cell = nn.TransformerCell(3, 8, 2, 5, jnp.tanh, **options, key=getkey())
    z, x = jr.normal(getkey(), (6, 8)), jr.normal(getkey(), (6, 3))
    mask = np.array(jr.bernoulli(getkey(), 0.6, (6, 6)))
    mask[2] = False
    for each in (mask, None):
        out = cell(z, x if each is None else (x, jnp.asarray(each)))
        expected = _block(cell, z, x, np.ones((6, 6), bool) if each is None else each)
        assert np.max(np.abs(out - expected)) < 1e-12


def test_a_causal_equilibrium_depends_on_no_later_input(getkey):
    options = {"causal": True, "position": _rotary(), "activation": jnp.tanh}
    cell = nn.TransformerCell(3, 8, 2, **options, key=getkey())
    layer = nn.FixedPointLayer(cell, _SOLVER)
    x = jr.normal(getkey(), (5, 3))
    z, changed = jax.jit(jax.vmap(layer))(jnp.stack([x, x.at[3].add(1.0)]))
    assert np.max(np.abs(z[:3] - changed[:3])) < 1e-10
    assert np.min(np.max(np.abs(z[3:] - changed[3:]), axis=1)) > 1e-3
    assert np.max(np.abs(_block(cell, z, x, np.ones((5, 5), bool)) - z)) < 1e-10


def test_padding_behind_a_mask_changes_nothing(getkey):
    cell = nn.TransformerCell(3, 8, 2, pre_norm=True, key=getkey())
    layer = nn.FixedPointLayer(cell, _SOLVER)
    xs = jr.normal(getkey(), (2, 5, 3))
    # Of the second sample only the first three positions are real.
    masks = jnp.ones((2, 5, 5), bool).at[1, :, 3:].set(False)
    whole, padded = jax.jit(jax.vmap(layer))((xs, masks))
    assert np.max(np.abs(padded[:3] - layer(xs[1, :3]))) < 1e-10
    assert np.max(np.abs(whole - layer(xs[0]))) < 1e-10
    grad = eqx.filter_grad(lambda x: jnp.sum(layer((x, masks[1]))[:3]))(xs[1])
    assert np.all(np.abs(grad[:3]) > 0)
    assert np.max(np.abs(grad[3:])) < 1e-10


def test_a_dropout_mask_is_the_same_over_a_solve(getkey):
    cell = nn.TransformerCell(3, 8, 2, pre_norm=True, dropout=0.4, key=getkey())
    layer = nn.FixedPointLayer(cell, _SOLVER)
    x, keys = jr.normal(getkey(), (5, 3)), jr.split(getkey(), 3)
    sols = jax.jit(jax.vmap(lambda key: layer.solve(x, key=key)))(keys)
    assert jnp.all(sols.result == eqlx.RESULTS.successful)
    for key, z in zip(keys, sols.value, strict=True):
        assert np.max(np.abs(cell(z, x, key=key) - z)) < 1e-10
    assert not np.allclose(sols.value[0], sols.value[1], atol=1e-3)
    assert not np.allclose(sols.value[0], sols.value[2], atol=1e-3)
    quiet = eqx.nn.inference_mode(cell)
    z = sols.value[0]
    expected = _block(quiet, z, x, np.ones((5, 5), bool), jax.nn.gelu)
    assert np.max(np.abs(quiet(z, x) - expected)) < 1e-12


def test_variational_dropout_keeps_the_mean_and_shares_along_axes(getkey):
    dropout, key = nn.VariationalDropout(0.25, axes=(0,)), getkey()
    x = jr.normal(getkey(), (4, 4000))
    out = dropout(x, key=key)
    kept = np.asarray(out != 0)
    assert np.array_equal(kept, np.broadcast_to(kept[:1], kept.shape))
    assert np.allclose(out, np.where(kept, x / 0.75, 0), rtol=1e-15)
    assert abs(kept[0].mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 4000)
    # Of whatever it is that is dropped from: the mask depends on the key alone.
    assert np.array_equal(dropout(jnp.ones_like(x), key=key) != 0, kept)
    assert not np.array_equal(dropout(x, key=getkey()) != 0, kept)
    each = nn.VariationalDropout(0.25)(x, key=key) != 0
    assert not np.array_equal(each[0], each[1])
    for off in (nn.VariationalDropout(0.0), eqx.nn.inference_mode(dropout)):
        assert off(x) is x
