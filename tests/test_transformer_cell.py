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


def _perceptron(cell, h):
    linear = lambda layer, h: h @ np.asarray(layer.weight).T + np.asarray(layer.bias)
    return linear(cell.output, np.tanh(linear(cell.hidden, h)))


def _block(cell, z, x, mask):
    """The formulas of the docstring, position by position."""
    z, x = np.asarray(z), np.asarray(x)
    if cell.causal:
        mask = mask & np.tri(len(x), dtype=bool)
    injection = np.asarray(cell.injection.weight), np.asarray(cell.injection.bias)
    injected = _normalise(x @ injection[0].T + injection[1])
    if cell.pre_norm:
        attended = _attention(cell, _normalise(z), mask)
        thought = _perceptron(cell, _normalise(z + attended))
        return injected + attended + thought
    h = z + injected
    h = _normalise(h + _attention(cell, h, mask))
    return _normalise(h + _perceptron(cell, h))


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
    options = {"causal": True, "position": _rotary()}
    cell = nn.TransformerCell(3, 8, 2, **options, key=getkey())
    layer = nn.FixedPointLayer(cell, _SOLVER)
    x = jr.normal(getkey(), (5, 3))
    z, changed = jax.jit(jax.vmap(layer))(jnp.stack([x, x.at[3].add(1.0)]))
    assert np.max(np.abs(z[:3] - changed[:3])) < 1e-10
    assert np.min(np.max(np.abs(z[3:] - changed[3:]), axis=1)) > 1e-3
    free = eqx.tree_at(lambda layer: layer.cell.causal, layer, False)
    assert not np.allclose(free(x)[:3], free(x.at[3].add(1.0))[:3], atol=1e-4)


def test_padding_behind_a_mask_changes_nothing(getkey):
    cell = nn.TransformerCell(3, 8, 2, pre_norm=True, key=getkey())
    layer = nn.FixedPointLayer(cell, _SOLVER)
    xs = jr.normal(getkey(), (2, 5, 3))
    # Of the second sample only the first three positions are real.
    lengths = jnp.array([5, 3])
    masks = jnp.broadcast_to(jnp.arange(5) < lengths[:, None, None], (2, 5, 5))
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
    quiet = eqx.nn.inference_mode(layer)
    expected = _block(quiet.cell, quiet(x), x, np.ones((5, 5), bool))
    del expected


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


def test_wrong_calls_say_what_was_wrong(getkey):
    new = lambda *args, **kwargs: nn.TransformerCell(3, *args, **kwargs, key=getkey())
    for make, message in (
        (lambda: new(8, 3), "`num_heads` must divide `features`; got 3 heads for 8"),
        (lambda: new(8, 0), "`num_heads` .* at least 1; got 0"),
        (lambda: new(8, 2, 0), "`width` .* at least 1; got 0"),
        (lambda: new(8, 2, 4, 1.0), "`activation` must be callable"),
        (lambda: new(8, 2, causal=1), "`causal` .* `bool`; got 1"),
        (lambda: new(8, 2, pre_norm="yes"), "`pre_norm` .* `bool`; got 'yes'"),
        (lambda: new(8, 2, position=_rotary(6)), "`position` .* 4 and float64; got 6"),
        (lambda: new(8, 2, position=True), "`position` must be an instance of"),
        (lambda: new(8, 2, dropout=1.0), r"`p` must be in \[0, 1\); got 1.0"),
        (lambda: new(8, 2, dtype=jnp.int8), "`dtype` .* got int8"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make()


def test_samples_that_do_not_fit_say_so(getkey):
    cell = nn.TransformerCell(3, 8, 2, dropout=0.1, key=getkey())
    z, x, key = jnp.zeros((5, 8)), jnp.zeros((5, 3)), getkey()
    square = jnp.ones((5, 5), bool)
    for call, message in (
        (lambda: cell.init(z), r"`x` .* \(length, 3\).*got \(5, 8\)"),
        (lambda: cell(z[:4], x, key=key), r"`z` .* \(5, 8\).*got \(4, 8\)"),
        (lambda: cell(z, (x, square[:, :4])), r"`mask` .* \(5, 5\).*got \(5, 4\)"),
        (lambda: cell(z, (x, 1.0 * square)), "`mask` must be boolean; got float64"),
        (lambda: cell(z, x.astype(jnp.float32)), "`x` .* float64; got float32"),
        (lambda: cell(z.astype(jnp.float32), x), "`z` .* float64; got float32"),
        (lambda: cell(z, x), "`key` is needed to drop anything; got `None`"),
        (lambda: nn.VariationalDropout(0.5, (2,))(x, key=key), r"`axes` .*got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
