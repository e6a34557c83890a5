"""The cells of images: convolutional and multiscale."""

import equilax as eqlx
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest


nn = eqlx.nn


def _conv(layer, x, stride=1):
    """A convolution from its definition, zero outside of the image."""
    weight = np.asarray(layer.weight)
    size = weight.shape[-1]
    around = (size // 2, size // 2)
    x = np.pad(x, ((0, 0), around, around))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    out = np.einsum("oikl,ihwkl->ohw", weight, windows[:, ::stride, ::stride])
    return out if layer.bias is None else out + np.asarray(layer.bias)


def _group_norm(x, groups):
    parts = x.reshape(groups, -1)
    mean, variance = parts.mean(1, keepdims=True), parts.var(1, keepdims=True)
    return ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)


def _block(block, z, injected, groups):
    relu = lambda x: np.maximum(x, 0)
    hidden = relu(_group_norm(_conv(block.first, z), groups))
    residual = _group_norm(injected + _conv(block.second, hidden), groups)
    return _group_norm(relu(z + residual), groups)


def _fused(fusion, x):
    if fusion.num_doublings > 0:
        repeats = np.ones((1, 2**fusion.num_doublings, 2**fusion.num_doublings))
        return np.kron(_conv(fusion.convs[0], x), repeats)
    for layer in fusion.convs[:-1]:
        x = np.maximum(_conv(layer, x, stride=2), 0)
    return _conv(fusion.convs[-1], x, stride=2)


def test_the_convolutional_cell_is_what_it_says(getkey):
    cell = nn.ConvCell(2, 6, 3, key=getkey())
    x, z = jr.normal(getkey(), (2, 5, 4)), jr.normal(getkey(), (6, 5, 4))
    injected = _group_norm(_conv(cell.injection, np.asarray(x)), 3)
    expected = _block(cell.block, np.asarray(z), injected, 3)
    assert np.max(np.abs(eqx.filter_jit(cell)(z, x) - expected)) < 1e-12


def test_the_multiscale_cell_is_what_it_says(getkey):
    cell = nn.MultiscaleCell(2, (2, 4, 6), 2, key=getkey())
    x = jr.normal(getkey(), (2, 8, 4))
    z = tuple(jr.normal(getkey(), a.shape) for a in cell.init(x))
    assert [a.shape for a in z] == [(2, 8, 4), (4, 4, 2), (6, 2, 1)]
    parts = []
    for i, block in enumerate(cell.blocks):
        step = 2**i
        small = sum(
            np.asarray(x)[:, k::step, l::step] / step**2
            for k in range(step)
            for l in range(step)
        )
        injected = _group_norm(_conv(cell.injections[i], small), 2)
        parts.append(_block(block, np.asarray(z[i]), injected, 2))
    out = eqx.filter_jit(cell)(z, x)
    for i, got in enumerate(out):
        total = parts[i] + sum(
            _fused(cell.fusions[i][j], parts[j]) for j in range(3) if j != i
        )
        assert np.max(np.abs(got - _group_norm(total, 2))) < 1e-12


def test_one_resolution_needs_no_fusion(getkey):
    cell = nn.MultiscaleCell(2, (4,), key=getkey())
    x, z = jr.normal(getkey(), (2, 3, 3)), jr.normal(getkey(), (4, 3, 3))
    injected = _group_norm(_conv(cell.injections[0], np.asarray(x)), 1)
    expected = _group_norm(_block(cell.blocks[0], np.asarray(z), injected, 1), 1)
    assert np.max(np.abs(cell((z,), x)[0] - expected)) < 1e-12


@pytest.mark.parametrize("scale", [0.0, 0.01, 100.0])
def test_dark_and_bright_images_converge_as_well(getkey, scale):
    # In a biased injection the bias of a dark image is the larger part, and the same
    # everywhere: the spectral radius is then close to one.
    def solve(key):
        cell_key, x_key = jr.split(key)
        cell = nn.ConvCell(2, 4, 2, dtype=jnp.float32, key=cell_key)
        x = scale * jr.normal(x_key, (2, 6, 6), jnp.float32)
        layer = nn.FixedPointLayer(cell, eqlx.Anderson(1e-5, 1e-5))
        return layer.solve(x)

    sol = eqx.filter_jit(eqx.filter_vmap(solve))(jr.split(getkey(), 6))
    assert jnp.all(sol.result == eqlx.RESULTS.successful)
    assert jnp.max(sol.stats["num_steps"]) < 30
