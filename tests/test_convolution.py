import re

import equilax as eqlx
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from equilax._convolution import with_quick_convolutions
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P


_LAYOUTS = (
    ("NCHW", "OIHW", "NCHW"),
    ("NHWC", "HWOI", "NHWC"),
    ("NHWC", "OIHW", "NCHW"),
    ("HWNC", "IHWO", "CWNH"),
)


def _correlation(x, kernel, strides, dilation, groups):
    """In NumPy: `x` as NHWC, `kernel` as HWIO, no padding."""
    height, width, _, num_out = kernel.shape
    dilated = np.zeros(
        (dilation * (height - 1) + 1, dilation * (width - 1) + 1, *kernel.shape[2:])
    )
    dilated[::dilation, ::dilation] = kernel
    windows = np.lib.stride_tricks.sliding_window_view(
        x, dilated.shape[:2], axis=(1, 2)
    )[:, :: strides[0], :: strides[1]]
    parts = zip(
        np.split(windows, groups, axis=3),
        np.split(dilated, groups, axis=3),
        strict=True,
    )
    assert num_out % groups == 0
    return np.concatenate(
        [np.einsum("nhwcij,ijco->nhwo", a, b) for a, b in parts], axis=3
    )


def _moved(array, old, new):
    return np.transpose(array, [old.index(axis) for axis in new])


@pytest.mark.parametrize("layout", _LAYOUTS, ids="-".join)
@pytest.mark.parametrize(
    ("strides", "dilation", "groups"), [((1, 1), 1, 1), ((2, 1), 2, 1), ((1, 1), 1, 2)]
)
def test_a_convolution_in_any_layout_has_its_value(layout, strides, dilation, groups):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 7, 16))
    kernel = rng.normal(size=(3, 2, 16 // groups, 6))
    expected = _correlation(x, kernel, strides, dilation, groups)

    @jax.jit
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            "VALID",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    given = (_moved(x, "NHWC", layout[0]), _moved(kernel, "HWIO", layout[1]))
    given = tuple(map(jnp.asarray, given))
    closed = jax.make_jaxpr(convolve)(*given)
    quick = with_quick_convolutions(closed)
    (out,) = jex.core.jaxpr_as_fun(quick)(*given)
    assert np.allclose(out, _moved(expected, "NHWC", layout[2]), rtol=1e-10, atol=1e-12)
    assert quick.jaxpr is not closed.jaxpr
    # What is quick already, as that is, stays as it was written.
    assert with_quick_convolutions(quick) is quick


def test_what_is_no_quicker_stays_as_it_is():
    image, kernel = jnp.ones((1, 4, 5, 5)), jnp.ones((4, 1, 3, 3))

    def depthwise(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", feature_group_count=4
        )

    closed = jax.make_jaxpr(depthwise)(image, kernel)
    assert with_quick_convolutions(closed) is closed


def test_one_dimension_and_three():
    rng = np.random.default_rng(0)
    for space in ((9,), (4, 5, 3)):
        x = rng.normal(size=(1, 1, *space))
        kernel = rng.normal(size=(1, 1, *(2 for _ in space)))
        windows = np.lib.stride_tricks.sliding_window_view(x[0, 0], kernel.shape[2:])
        axes = tuple(range(-len(space), 0))
        expected = np.sum(windows * kernel[0, 0], axis=axes)
        convolve = lambda x, k: lax.conv(x, k, (1,) * (x.ndim - 2), "VALID")
        given = (jnp.asarray(x), jnp.asarray(kernel))
        quick = with_quick_convolutions(jax.make_jaxpr(convolve)(*given))
        (out,) = jex.core.jaxpr_as_fun(quick)(*given)
        assert np.allclose(out[0, 0], expected, rtol=1e-10, atol=1e-12)


def _cell(z, args):
    kernel, x = args
    return jnp.tanh(lax.conv(z[None], kernel, (1, 1), "SAME")[0] + x)


def _problem():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.1 * rng.normal(size=(2, 2, 3, 3)))
    return kernel, jnp.asarray(rng.normal(size=(4, 2, 5, 4)))


def _solutions(kernel, xs):
    solver = eqlx.FixedPointIteration(rtol=1e-13, atol=1e-13)

    def solve(x):
        z0 = jnp.zeros_like(x)
        return eqlx.fixed_point(_cell, solver, z0, (kernel, x), throw=False).value

    return jax.vmap(solve)(xs)


def _loss(kernel, xs):
    return jnp.sum(_solutions(kernel, xs) ** 2)


def _true_gradient(kernel, xs):
    """In `xs`, with a dense Jacobian for each sample."""
    found = []
    for x in xs:
        z = jnp.zeros_like(x)
        for _ in range(200):
            z = _cell(z, (kernel, x))
        jacobian = jax.jacfwd(_cell)(z, (kernel, x)).reshape(x.size, x.size)
        u = np.linalg.solve(np.eye(x.size) - np.asarray(jacobian).T, 2 * z.reshape(-1))
        found.append((1 - np.asarray(z) ** 2) * u.reshape(x.shape))
    return np.stack(found)


def test_gradients_with_channels_first_are_those_of_the_dense_system():
    kernel, xs = _problem()
    grads = jax.jit(jax.grad(_loss, 1))(kernel, xs)
    assert np.allclose(grads, _true_gradient(kernel, xs), rtol=1e-8, atol=1e-10)


def test_gradients_are_so_inside_of_shard_map():
    kernel, xs = _problem()
    sharded = jax.shard_map(
        jax.grad(_loss, 1),
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=True,
    )
    grads = jax.jit(sharded)(kernel, xs)
    assert np.allclose(grads, _true_gradient(kernel, xs), rtol=1e-8, atol=1e-10)


def test_no_loop_of_a_solve_or_its_gradient_has_a_slow_convolution():
    text = jax.jit(jax.grad(_loss, 1)).lower(*_problem()).compile().as_text()
    layouts = re.findall(r" convolution\(.*?dim_labels=(\S+?),? ", text or "")
    assert layouts
    assert set(layouts) == {"b01f_01io->b01f"}
