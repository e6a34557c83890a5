"""The workloads, from the notebook's system to a transformer block.

Inputs are drawn by NumPy from seed 0. `small` makes them tiny, to see that all works.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .workload import Workload


def tanh_cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


def scaled_cell(z, args):
    """The input has the rate at which its sample contracts in front."""
    w, x = args
    return jnp.tanh(x[0] * (w @ z) + x[1:])


def _symmetric(rng, size: int) -> np.ndarray:
    w = rng.normal(size=(size, size))
    w = w + w.T
    return w / np.linalg.norm(w, ord=2)


def _notebook(num: int, name: str) -> Workload:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(10, 10))
    w = 0.9 * w / np.linalg.norm(w, ord=2)
    xs = rng.normal(size=(num, 10))
    what = f"the notebook's system, 10 unknowns, {num} of them"
    cts = rng.normal(size=xs.shape)
    return Workload(name, what, tanh_cell, w, xs, cts, torch_cell="tanh_cell")


def tanh(gain: float, size: int, batch: int, name: str = "", **kwargs) -> Workload:
    rng = np.random.default_rng(0)
    w = gain * _symmetric(rng, size)
    # Small enough not to saturate the cell: the gain is nearly its contraction factor.
    xs = 0.1 * rng.normal(size=(batch, size))
    what = f"tanh cell, gain {gain}, {size} unknowns, {batch} samples"
    cts = rng.normal(size=xs.shape)
    kwargs = {"torch_cell": "tanh_cell", **kwargs}
    return Workload(name or what, what, tanh_cell, w, xs, cts, **kwargs)


def _ragged(rates: np.ndarray, size: int, name: str, what: str) -> Workload:
    """Samples whose contraction factors are `rates`."""
    rng = np.random.default_rng(0)
    w = _symmetric(rng, size)
    # What a slow sample converges to is of the size of what a quick one does.
    x = 0.1 * rng.normal(size=(len(rates), size)) * (1 - rates[:, None]) ** 0.5
    xs = np.concatenate([rates[:, None], x], axis=1)
    cts = rng.normal(size=x.shape)
    what = f"{what}, {size} unknowns, {len(rates)} samples"
    options: Any = {"max_steps": 4000, "torch_cell": "scaled_cell"}
    return Workload(name, what, scaled_cell, w, xs, cts, **options)


def _slow(num: int, batch: int) -> np.ndarray:
    rates = np.full(batch, 0.5)
    rates[np.random.default_rng(1).permutation(batch)[:num]] = 0.99
    return rates


def _log_normal(batch: int) -> np.ndarray:
    """Steps to a tolerance are log-normal: a median of ten, a few in the hundreds."""
    steps = np.exp(np.log(10) + np.random.default_rng(1).normal(size=batch))
    return np.minimum(np.exp(-np.log(1e4) / steps), 0.99)


def convolution(z, args):
    (kernel, mixing), x = args
    pad = lambda z, k: jax.lax.conv_general_dilated(
        z[None], k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    return jnp.tanh(pad(z, kernel) + x @ mixing)


def _convolution(side: int, channels: int, batch: int) -> Workload:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, channels, channels)) / (9 * channels) ** 0.5
    mixing = rng.normal(size=(channels, channels)) / channels**0.5
    xs = 0.3 * rng.normal(size=(batch, side, side, channels))
    what = f"convolutional cell, {side} x {side} x {channels}, {batch} samples"
    params = (0.4 * kernel, mixing)
    cts = rng.normal(size=xs.shape)
    options: Any = {"is_dense": False, "torch_cell": "convolution"}
    return Workload("convolutional", what, convolution, params, xs, cts, **options)


def _normalise(z):
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    return z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-5)


def transformer(z, args):
    """A causal block after Bai et al. 2019, the input where a residual would be."""
    params, x = args
    length, width = z.shape
    heads = 4
    split = lambda w: jnp.moveaxis((z @ w).reshape(length, heads, -1), 1, 0)
    query, key, value = (split(params[k]) for k in ("query", "key", "value"))
    scores = query @ jnp.swapaxes(key, 1, 2) / (width / heads) ** 0.5
    causal = np.tril(np.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    mixed = jnp.moveaxis(weights @ value, 0, 1).reshape(length, width)
    h = _normalise(x + mixed @ params["output"])
    return _normalise(h + jnp.tanh(h @ params["up"]) @ params["down"])


def _transformer(length: int, width: int, batch: int) -> Workload:
    rng = np.random.default_rng(0)
    matrix = lambda rows, columns: rng.normal(size=(rows, columns)) / rows**0.5
    params = {k: matrix(width, width) for k in ("query", "key", "value")}
    params["output"] = 0.7 * matrix(width, width)
    params["up"] = matrix(width, 2 * width)
    params["down"] = 0.5 * matrix(2 * width, width)
    xs = rng.normal(size=(batch, length, width))
    what = f"transformer block, {length} x {width}, {batch} samples"
    cts = rng.normal(size=xs.shape)
    options: Any = {"is_dense": False, "target": 3e-4, "torch_cell": "transformer"}
    return Workload("transformer", what, transformer, params, xs, cts, **options)


def all_workloads(small: bool) -> dict[str, Callable[[], Workload]]:
    """By name, and made when they are wanted."""
    size, batch = (16, 32) if small else (256, 256)
    slow = 4 if small else 26
    sequence = (8, 16, 2) if small else (64, 128, 8)
    image = (4, 4, 2) if small else (16, 32, 16)
    stiff = (32, 4) if small else (1024, 16)
    return {
        "notebook": lambda: _notebook(1, "notebook"),
        "notebook x 1024": lambda: _notebook(32 if small else 1024, "notebook x 1024"),
        "uniform": lambda: tanh(0.9, size, batch, "uniform"),
        "ragged, 2 slow": lambda: _ragged(
            _slow(2, batch), size, "ragged, 2 slow", "2 slow samples"
        ),
        "ragged, 10%": lambda: _ragged(
            _slow(slow, batch), size, "ragged, 10%", "10% slow samples"
        ),
        "ragged, log-normal": lambda: _ragged(
            _log_normal(batch), size, "ragged, log-normal", "log-normal difficulty"
        ),
        "stiff": lambda: tanh(0.99, *stiff, "stiff", max_steps=4000),
        "transformer": lambda: _transformer(*sequence),
        "convolutional": lambda: _convolution(*image),
    }
