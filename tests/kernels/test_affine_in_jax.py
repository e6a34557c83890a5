"""`affine_fixed_point` under transformations, and what it refuses."""

import equilax_kernels
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from equilax_kernels.affine_fixed_point import Status, triton
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

from ..helpers import optimised_hlo
from .backends import run, solve_on


_OPTIONS = {"activation": None, "rtol": 0.0, "atol": 1e-5, "max_steps": 200}


def _solve(weight, u, **options):
    z0 = jnp.zeros_like(u)
    return equilax_kernels.affine_fixed_point(weight, u, z0, **(_OPTIONS | options))


def _problem(key, *rows, d=4):
    w_key, u_key = jr.split(key)
    weight = jr.normal(w_key, (d, d), jnp.float32)
    weight = 0.5 * weight / jnp.linalg.norm(weight, ord=2)
    return weight, jr.normal(u_key, (*rows, d), jnp.float32)


def _is_close(got, weight, u, tolerance=1e-5):
    """Whether this is the solution: half contracts, and a 2-norm has four features."""
    weight, u, got = (np.asarray(x, np.float64) for x in (weight, u, got))
    expected = np.linalg.solve(np.eye(len(weight)) - weight, u.T).T
    return got.shape == u.shape and np.abs(got - expected).max() < 4.1 * tolerance


@pytest.fixture
def unchecked():
    """What a user sees, for whom nobody checks annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_batches_join_the_rows(getkey):
    weight, u = _problem(getkey(), 3, 2, 5)
    solve = lambda u: _solve(weight, u)
    out = jax.vmap(jax.vmap(solve, in_axes=1, out_axes=1))(u.swapaxes(1, 2))
    assert out.value.shape == (3, 5, 2, 4)
    assert out.num_steps.shape == out.residual.shape == out.status.shape == (3, 5, 2)
    for got, rows in zip(out.value, u, strict=True):
        for i, row in enumerate(rows):
            assert _is_close(got[:, i], weight, row)
    # The loop has one matrix product, of all rows at once.
    text = str(jax.make_jaxpr(jax.vmap(solve))(u[0]))
    assert "f32[10,4]" in text


def test_what_all_samples_share_may_be_anything_but_u(getkey):
    weight, u = _problem(getkey(), 3, 5)
    scale = jr.uniform(getkey(), (3, 5, 4), jnp.float32)
    out = jax.vmap(lambda s: _solve(weight, u[0], scale=s))(scale)
    for got, slopes in zip(out.value, scale, strict=True):
        for z, row, s in zip(got, u[0], slopes, strict=True):
            assert _is_close(z[None], weight * s[None], row[None])


def test_a_batch_of_weights(getkey):
    weight, u = _problem(getkey(), 5)
    weights = jnp.stack([weight, -weight, weight.T])
    out = jax.vmap(lambda w: _solve(w, u))(weights)
    for got, w in zip(out.value, weights, strict=True):
        assert _is_close(got, w, u)
    with pytest.raises(ValueError, match="does not take a batch of `weight`"):
        jax.vmap(lambda w: _solve(w, u, implementation="tpu"))(weights)


def test_a_batch_of_tolerances():
    # Residuals of 2^-k.
    weight, u = jnp.full((1, 1), 0.5, jnp.float32), jnp.ones((1, 1), jnp.float32)
    solve = lambda atol: _solve(weight, u, atol=atol)
    out = jax.vmap(solve)(2.0 ** -jnp.arange(3.0, 6.0))
    assert out.num_steps[:, 0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("backend", ["reference", "tpu_strict"])
def test_each_device_solves_its_own_rows(getkey, backend):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    weight, u = _problem(getkey(), 24)
    u = u * 10.0 ** jnp.arange(-3, 0, 1 / 8, jnp.float32)[:, None]

    def solve(u):
        return solve_on(backend, weight, u, activation=None)

    spec = P("rows")
    sharded = jax.shard_map(solve, mesh=mesh, in_specs=spec, out_specs=spec)
    out = jax.jit(sharded)(u)
    assert _is_close(out.value, weight, u)
    alone = run(backend, weight, u, activation=None)
    assert np.array_equal(out.num_steps, alone.num_steps)
    text = optimised_hlo(sharded, u)
    assert not any(name in text for name in ("all-reduce", "all-gather", "permute"))


def test_on_a_cpu_nothing_is_left_of_the_kernels(getkey):
    weight, u = _problem(getkey(), 9)
    text = optimised_hlo(lambda u: _solve(weight, u, activation=jnp.tanh), u)
    assert " while(" in text
    assert "custom-call" not in text
    assert " conditional(" not in text


def test_the_kernels_are_traced_where_their_platform_may_be(getkey):
    weight, u = _problem(getkey(), 9)
    solve = jax.jit(lambda u: _solve(weight, u, activation=jnp.tanh))
    exported = jax.export.export(solve, platforms=["tpu"])(
        jax.ShapeDtypeStruct(u.shape, u.dtype)
    )
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize(
    "options",
    [{"activation": jnp.sin}, {"activation": jnp.tanh, "history_length": 6}],
)
def test_what_no_kernel_takes_the_reference_does(options):
    weight, u = jnp.zeros((2, 2), jnp.float32), jnp.ones((3, 2), jnp.float32)
    out = _solve(weight, u, **options)
    assert np.allclose(out.value, options["activation"](u))
    for name in ("tpu", "triton"):
        with pytest.raises(ValueError, match=r"float32\[3, 2\].* (sin|history)"):
            _solve(weight, u, implementation=name, **options)


def test_double_precision_is_the_references(getkey):
    weight, u = (x.astype(jnp.float64) for x in _problem(getkey(), 3))
    out = _solve(weight, u, atol=1e-13)
    assert _is_close(out.value, weight, u, 1e-13)
    with pytest.raises(ValueError, match="the dtype is float64"):
        _solve(weight, u, implementation="triton")


def test_the_precision_the_user_has_set_is_what_counts():
    weight, u = jnp.zeros((2, 2), jnp.float32), jnp.ones((3, 2), jnp.float32)
    with pytest.raises(ValueError, match="neither DEFAULT nor HIGHEST"):
        _solve(weight, u, precision=lax.Precision.HIGH, implementation="tpu")
    with (
        jax.default_matmul_precision("high"),
        pytest.raises(ValueError, match="neither DEFAULT nor HIGHEST"),
    ):
        _solve(weight, u, implementation="triton")


@pytest.mark.parametrize("precision", [lax.Precision.DEFAULT, lax.Precision.HIGHEST])
def test_the_largest_sizes(precision):
    zeros = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    refused = {"tpu": (5, 4096), "triton": (5, 129)}
    for name, shape in refused.items():
        options = {"implementation": name, "precision": precision}
        solve = lambda w, u, options=options: _solve(w, u, **options)
        with pytest.raises(ValueError, match="VMEM|registers"):
            jax.eval_shape(solve, zeros(shape[1], shape[1]), zeros(*shape))
    solve = lambda w, u: _solve(w, u)
    out = jax.eval_shape(solve, zeros(4096, 4096), zeros(5, 4096))
    assert out.value.shape == (5, 4096)


def test_nothing_to_solve():
    out = _solve(jnp.zeros((3, 3)), jnp.zeros((0, 3)))
    assert out.value.shape == (0, 3)
    out = _solve(jnp.zeros((0, 0)), jnp.zeros((2, 0)))
    assert out.status.tolist() == [Status.SUCCESSFUL] * 2


def test_it_has_no_derivative(getkey):
    weight, u = _problem(getkey(), 3)
    with pytest.raises(TypeError, match="no derivative of its own"):
        jax.grad(lambda u: jnp.sum(_solve(weight, u).value))(u)
    with pytest.raises(TypeError, match="no derivative of its own"):
        jax.jvp(lambda u: _solve(weight, u).value, (u,), (u,))


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((2, 3), (5, 3), (5, 3)), r"\(2, 3\), \(5, 3\)"),
        (((3, 3), (5, 3), (4, 3)), r"\(3, 3\), \(5, 3\), \(4, 3\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit(shapes, match):
    arrays = [jnp.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=match):
        equilax_kernels.affine_fixed_point(*arrays, **_OPTIONS)


@pytest.mark.usefixtures("unchecked")
def test_other_wrong_calls():
    weight, u = jnp.zeros((2, 2), jnp.float32), jnp.ones((3, 2), jnp.float32)
    with pytest.raises(ValueError, match=r"one real floating-point dtype.*float64"):
        _solve(weight.astype(jnp.float64), u)
    with pytest.raises(ValueError, match="`implementation` must be None or one of"):
        _solve(weight, u, implementation="cuda")
    with pytest.raises(ValueError, match="`max_steps`.*-1"):
        _solve(weight, u, max_steps=-1)


def test_a_tile_reaches_beyond_no_edge():
    # An interpreter drops what is written out of bounds; a device does not.
    tile = triton.Tile(jnp.arange(16, 20), jnp.arange(8), num_rows=18, d=7)
    _, mask = tile.at(jnp.zeros((18, 7)), 0)
    expected = np.zeros((4, 8), bool)
    expected[:2, :7] = True
    assert np.array_equal(mask, expected)
