"""Wrong cells and samples that do not fit say what was wrong."""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.experimental import sparse


nn = eqlx.nn


@pytest.fixture(autouse=True)
def _without_checked_types():
    """Users do not have the runtime type checks that the tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


_NO_FUNCTION: Any = 2
_WRONG = [
    (lambda k: nn.MLPCell(3, 4, 0, key=k), "`width` .* at least 1; got 0"),
    (lambda k: nn.MLPCell(3, 4, 5, 0, key=k), "`depth` .* at least 1; got 0"),
    (
        lambda k: nn.MLPCell(3, 4, 5, activation=_NO_FUNCTION, key=k),
        "`activation` .* callable",
    ),
    (
        lambda k: nn.GraphCell(3, 4, _NO_FUNCTION, key=k),
        "`activation` must be callable",
    ),
    (lambda k: nn.MLPCell(3, 4, 5, dtype=int, key=k), "`dtype` .* got int"),
    (lambda k: nn.GRUCell(3, -1, key=k), "`features` .* at least 1; got -1"),
    (lambda k: nn.GraphCell(0, 1, key=k), "`in_features` .* at least 1; got 0"),
]


@pytest.mark.parametrize(("make", "message"), _WRONG, ids=[m for _, m in _WRONG])
def test_a_wrong_constructor_says_what_was_wrong(getkey, make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(getkey())


@pytest.mark.parametrize("kind", [nn.MLPCell, nn.GRUCell])
def test_a_sample_that_does_not_fit_says_so(getkey, kind):
    sizes = (3, 4, 5) if kind is nn.MLPCell else (3, 4)
    new: Any = kind
    cell = new(*sizes, dtype=jnp.float32, key=getkey())
    z, x = jnp.zeros(4, jnp.float32), jnp.zeros(3, jnp.float32)
    for call in (cell.init, lambda x: cell(z, x)):
        with pytest.raises(ValueError, match=r"`x` .* \(3,\).*got \(5,\)"):
            call(jnp.zeros(5, jnp.float32))
    with pytest.raises(ValueError, match=r"`z` .* \(4,\).*got \(3,\)"):
        cell(x, x)
    with pytest.raises(ValueError, match="`x` .* float32; got float64"):
        cell(z, jnp.zeros(3))
    with pytest.raises(ValueError, match="`z` .* float32; got float64"):
        cell(jnp.zeros(4), x)


def test_wrong_transformer_cells(getkey):
    new = lambda *args, **kwargs: nn.TransformerCell(3, *args, **kwargs, key=getkey())
    for make, message in (
        (lambda: new(8, 3), "`num_heads` must divide `features`; got 3 heads for 8"),
        (lambda: new(8, 0), "`num_heads` .* at least 1; got 0"),
        (lambda: new(8, 2, 0), "`width` .* at least 1; got 0"),
        (lambda: new(8, 2, 4, 1.0), "`activation` must be callable"),
        (lambda: new(8, 2, causal=1), "`causal` .* `bool`; got 1"),
        (lambda: new(8, 2, pre_norm="yes"), "`pre_norm` .* `bool`; got 'yes'"),
        (
            lambda: new(8, 2, position=eqx.nn.RotaryPositionalEmbedding(6)),
            "`position` .* 4 and float64; got 6",
        ),
        (lambda: new(8, 2, position=True), "`position` must be an instance of"),
        (lambda: new(8, 2, dropout=1.0), r"`dropout` .* \[0, 1\); got 1.0"),
        (lambda: new(8, 2, dtype=jnp.int8), "`dtype` .* got int8"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make()


def test_samples_that_do_not_fit_a_cell_of_transformers(getkey):
    cell = nn.TransformerCell(3, 8, 2, dropout=0.1, key=getkey())
    z, x, key = jnp.zeros((5, 8)), jnp.zeros((5, 3)), getkey()
    square = jnp.ones((5, 5), bool)
    for call, message in (
        (lambda: cell.init(z), r"`x` .* \(length, 3\).*got \(5, 8\)"),
        (lambda: cell(z[:4], x, key=key), r"`z` .* \(5, 8\).*got \(4, 8\)"),
        (lambda: cell(z, (x, square[:, :4])), r"`mask` .* \(5, 5\).*got \(5, 4\)"),
        (
            lambda: cell(z, (x, square.astype(float))),
            "`mask` must be boolean; got float64",
        ),
        (lambda: cell(z, x.astype(jnp.float32)), "`x` .* float64; got float32"),
        (lambda: cell(z.astype(jnp.float32), x), "`z` .* float64; got float32"),
        (lambda: cell(z, x), "`key` is needed to drop anything; got `None`"),
        (lambda: nn.VariationalDropout(0.5, (2,))(x, key=key), r"`axes` .*got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_image_cells(getkey):
    conv = lambda *args, **kwargs: nn.ConvCell(2, *args, **kwargs, key=getkey())
    scales = lambda *args: nn.MultiscaleCell(2, *args, key=getkey())
    for make, message in (
        (lambda: conv(0), "`channels` .* at least 1; got 0"),
        (lambda: conv(4, 3), "`groups` must divide `channels`; got 3 groups of 4"),
        (lambda: conv(4, 0), "`groups` .* at least 1; got 0"),
        (lambda: conv(4, 2, "relu"), "`activation` must be callable"),
        (lambda: conv(4, dtype=bool), "`dtype` .* got bool"),
        (lambda: scales(()), "`channels` .* got none"),
        (lambda: scales((4, 0)), "`channels` .* at least 1; got 0"),
        (lambda: scales((4, 6), 4), "`groups` must divide `channels`; got 4 .* of 6"),
        (lambda: scales((4,), 2, _NO_FUNCTION), "`activation` must be callable"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make()


def test_samples_that_do_not_fit_a_cell_of_images(getkey):
    conv = nn.ConvCell(2, 4, key=getkey())
    scales = nn.MultiscaleCell(2, (4, 4), key=getkey())
    x = jnp.zeros((2, 6, 4))
    z, zs = conv.init(x), scales.init(x)
    single = x.astype(jnp.float32)
    for call, message in (
        (lambda: conv.init(z), r"`x` .* \(2, height, width\).*got \(4, 6, 4\)"),
        (lambda: conv(z[:, :5], x), r"`z` .* \(4, 6, 4\).*got \(4, 5, 4\)"),
        (lambda: conv(z, single), "`x` .* float64; got float32"),
        (lambda: scales.init(z), r"`x` .* \(2, height, width\).*got \(4, 6, 4\)"),
        (lambda: scales.init(x[:, :5]), "`x` .* that 2 divides.*got 5 and 4"),
        (lambda: scales((zs[0],), x), "`z` must be a tuple of 2 arrays.*got 1"),
        (lambda: scales(zs[::-1], x), r"`z\[0\]` .* \(4, 6, 4\).*got \(4, 3, 2\)"),
        (lambda: scales(zs, single), "`x` .* float64; got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_graph_cells(getkey):
    cell = nn.GraphCell(3, 4, key=getkey())
    z, x, a = jnp.zeros((5, 4)), jnp.zeros((5, 3)), jnp.eye(5)
    coo = sparse.BCOO.fromdense(a)
    batched = sparse.BCOO.fromdense(a, n_dense=1)
    single = a.astype(jnp.float32)
    for call, message in (
        (lambda: cell(z, (x, a[:4])), r"`adjacency` .* square .*got .*\(4, 5\)"),
        (lambda: cell(z, (x, coo[:4])), r"`adjacency` .* square .*got .*\(4, 5\)"),
        (lambda: cell.init((x, a[:4, :4])), r"`adjacency` .* 5; got .*\(4, 4\)"),
        (lambda: cell(z, (x, a > 0)), "`adjacency` .* floating-point dtype; got bool"),
        (lambda: cell(z, (x, single)), "`adjacency` .* float64; got float32"),
        (lambda: cell(z, (x.astype(jnp.float32), a)), "`x` .* got float32"),
        (lambda: cell(z[:, :3], (x, a)), r"`z` .* \(5, 4\).*got \(5, 3\)"),
        (lambda: cell.init((z, a)), r"`x` .* \(nodes, 3\).*got \(5, 4\)"),
        (lambda: cell.init(x), "`x` must be a pair .*; got"),
        (lambda: nn.normalise_adjacency(a[:4]), r"`adjacency` .*got .*\(4, 5\)"),
        (lambda: nn.normalise_adjacency(a > 0), "`adjacency` .* got bool"),
        (lambda: nn.normalise_adjacency(batched), "`adjacency` .*`n_dense=1`"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
