import equilax as eqlx
import equilax_kernels
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from equilax_kernels.affine_fixed_point import specs, Status

from ..helpers import newton
from .backends import BACKENDS, run


_ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "identity": None,
}
_EPS = float(jnp.finfo(jnp.float32).eps)

every_backend = pytest.mark.parametrize("backend", list(BACKENDS))
every_kernel = pytest.mark.parametrize("backend", ["tpu", "triton"])


def _problem(key, rows, d, gain=0.7):
    """Weights of spectral norm `gain`, and what is added: rows of different sizes."""
    w_key, u_key, s_key = jr.split(key, 3)
    weight = jr.normal(w_key, (d, d), jnp.float64)
    weight = gain * weight / jnp.linalg.norm(weight, ord=2)
    sizes = 10.0 ** jnp.linspace(-3, 1, rows)
    u = sizes[:, None] * jr.normal(u_key, (rows, d), jnp.float64)
    scale = jr.uniform(s_key, (rows, d), jnp.float64)
    # What a kernel sees, so that the truth is that of the same problem.
    single = (np.asarray(x, np.float32) for x in (weight, u, scale))
    return tuple(x.astype(np.float64) for x in single)


def _truth(weight, u, scale, activation):
    activation = activation or (lambda x: x)
    scale = np.ones_like(u) if scale is None else scale

    def cell(z, args):
        u, s = args
        return activation(weight @ (s * z) + u)

    zero = jnp.zeros(u.shape[1])
    return np.stack([newton(cell, zero, pair) for pair in zip(u, scale, strict=True)])


@every_backend
@pytest.mark.parametrize(
    "spec", specs.SMALL, ids=[f"{s.rows}x{s.d}" for s in specs.SMALL]
)
def test_solves_what_does_not_fill_a_tile(getkey, capfd, backend, spec):
    weight, u, scale = _problem(getkey(), spec.rows, spec.d)
    scale = scale if spec.is_scaled else None
    m = spec.history_length
    out = run(backend, weight, u, scale=scale, history_length=m)
    assert np.all(out.status == Status.SUCCESSFUL)
    expected = _truth(weight, u, scale, jnp.tanh)
    # At a gain of 0.7 in the 2-norm the error is 3.3 residuals of the 2-norm at most.
    bound = 3.4 * spec.d**0.5 * 1e-5 * (1 + np.abs(expected).max(1, keepdims=True))
    assert np.all(np.abs(out.value - expected) < bound)
    image = np.tanh((out.value if scale is None else out.value * scale) @ weight.T + u)
    residual = np.abs(image - out.value).max(1)
    assert np.allclose(out.residual, residual, rtol=1e-3, atol=8 * spec.d * _EPS)
    assert "RACE" not in capfd.readouterr().out


@every_backend
@pytest.mark.parametrize("name", list(_ACTIVATIONS))
def test_each_activation(getkey, backend, name):
    weight, u, scale = _problem(getkey(), 5, 6, gain=0.6)
    options = {"scale": scale, "rtol": 0.0, "atol": 1e-5}
    activation = _ACTIVATIONS[name]
    out = run(backend, weight, u, activation=activation, **options)
    assert np.all(out.status == Status.SUCCESSFUL)
    expected = _truth(weight, u, scale, activation)
    # The slope of GELU is at most 1.13.
    assert np.abs(out.value - expected).max() < 6**0.5 / (1 - 0.6 * 1.13) * 1.01e-5


@every_backend
def test_the_adjoint_is_the_same_solve(getkey, backend):
    weight, g, slopes = _problem(getkey(), 10, 12)
    out = run(backend, weight.T, g, activation=None, scale=slopes, atol=1e-6, rtol=1e-6)
    jacobians = slopes[:, :, None] * weight
    system = np.eye(12) - np.swapaxes(jacobians, 1, 2)
    expected = np.linalg.solve(system, g[:, :, None])[:, :, 0]
    size = np.abs(expected).max(1, keepdims=True)
    assert np.all(np.abs(out.value - expected) < 4 * 12**0.5 * 1e-6 * (1 + size))


@every_backend
def test_each_row_ends_at_its_own_step_and_stays_there(backend):
    # z = z / 2 + u from zero: after k steps 2 u (1 - 2^-k), with the residual u 2^-k.
    u = 2.0 ** np.array([0, 3, -3, 6, 1, -20, 9, 0, 4, 5])[:, None]
    steps = np.maximum(11 + np.log2(u[:, 0]), 0).astype(int)
    out = run(backend, [[0.5]], u, activation=None, rtol=0.0, atol=2.0**-10)
    assert out.num_steps.tolist() == steps.tolist()
    assert np.array_equal(out.value[:, 0], 2 * u[:, 0] * (1 - 0.5**steps))
    assert np.array_equal(out.residual, u[:, 0] * 0.5**steps)
    assert np.all(out.status == Status.SUCCESSFUL)


@every_backend
def test_the_relative_tolerance_is_that_of_the_value_returned(backend):
    # 2^-k < 0.14 (1 - 2^-k) from the fourth step on: 0.063 < 0.131, not 0.125 < 0.1225.
    # With the size of the image, 0.131, the third would do.
    out = run(backend, [[0.5]], [[1.0]], activation=None, rtol=0.07, atol=0.0)
    assert out.num_steps.tolist() == [4]
    # Every feature has a tolerance of its own: the first has the slow row's steps.
    out = run(
        backend,
        np.diag([0.5, 0.0]),
        [[1.0, 1e4]],
        activation=None,
        rtol=0.07,
        atol=0.0,
    )
    assert out.num_steps.tolist() == [4]


@every_backend
def test_a_start_at_the_solution_takes_no_step(backend):
    # Three features do not fill up a tile, and what does would not be at rest.
    start = np.full((2, 3), np.log(2))
    out = run(backend, np.zeros((3, 3)), 0 * start, start, activation=jax.nn.softplus)
    assert out.num_steps.tolist() == [0, 0]
    assert np.allclose(out.value, np.log(2), rtol=_EPS)


@every_backend
def test_damping(backend):
    # z = -z + 1: by half, at once; by a quarter z - 1/2 halves with a change of sign.
    out = run(backend, [[-1.0]], [[1.0]], activation=None, damp=0.5)
    assert (out.num_steps.tolist(), out.value.tolist()) == ([1], [[0.5]])
    out = run(
        backend,
        [[-1.0]],
        [[1.0]],
        activation=None,
        damp=0.25,
        rtol=0.0,
        atol=2.0**-10,
    )
    assert out.num_steps.tolist() == [11]
    assert out.value.tolist() == [[0.5 + 2.0**-12]]


@every_backend
def test_running_out_of_steps(backend):
    # Residuals of 2^-k: the last is the best. At the sixth step none is tested less.
    out = run(backend, [[0.5]], [[1.0]], activation=None, max_steps=6)
    assert out.status.tolist() == [Status.MAX_STEPS_REACHED]
    assert out.num_steps.tolist() == [6]
    assert (out.value.tolist(), out.residual.tolist()) == ([[2 - 2**-5]], [2**-6])
    at_once = run(backend, [[0.5]], [[1.0]], activation=None, max_steps=0)
    assert (at_once.num_steps.tolist(), at_once.value.tolist()) == ([0], [[0.0]])


@every_backend
def test_a_failure_returns_the_best_iterate(backend):
    # z = -2 z + 3: the residual is 3 at zero and doubles, up to 2^27 > 1e8 times that.
    out = run(backend, [[-2.0]], [[3.0]], activation=None)
    assert out.status.tolist() == [Status.DIVERGENCE]
    assert out.num_steps.tolist() == [27]
    assert (out.value.tolist(), out.residual.tolist()) == ([[0.0]], [3.0])


@every_backend
def test_of_equal_residuals_the_last_is_the_best(backend):
    # z = -z + 2 from zero goes back and forth between zero and two.
    out = run(backend, [[-1.0]], [[2.0]], activation=None, max_steps=7)
    assert out.status.tolist() == [Status.MAX_STEPS_REACHED]
    assert (out.value.tolist(), out.residual.tolist()) == ([[2.0]], [2.0])


@every_backend
def test_steps_at_the_level_of_rounding_stagnate(backend):
    # z = -z + 2 from next to one: exactly back and forth, and never within 1e-9.
    start = [[1 + _EPS], [1.0]]
    out = run(
        backend, [[-1.0]], [[2.0], [2.0]], start, activation=None, rtol=0.0, atol=1e-9
    )
    assert out.status.tolist() == [Status.STAGNATION, Status.SUCCESSFUL]
    assert out.num_steps.tolist() == [30, 0]


@every_kernel
def test_a_thousand_steps_without_progress_are_enough(backend):
    out = run(backend, [[-1.0]], [[2.0]], activation=None, max_steps=2000)
    assert out.status.tolist() == [Status.STAGNATION]
    assert out.num_steps.tolist() == [1000]


@every_backend
def test_what_is_not_finite_harms_no_other_row(getkey, backend):
    weight, u, _ = _problem(getkey(), 11, 6)
    broken = u.copy()
    broken[2, 3], broken[9, 0] = np.nan, np.inf
    clean = run(backend, weight, u, activation=jax.nn.relu)
    out = run(backend, weight, broken, activation=jax.nn.relu)
    others = np.setdiff1d(np.arange(11), [2, 9])
    for got, expected in zip(out, clean, strict=True):
        assert np.array_equal(got[others], expected[others])
    assert out.status[[2, 9]].tolist() == [Status.NONFINITE] * 2
    assert out.num_steps[[2, 9]].tolist() == [0, 0]
    assert np.all(out.value[[2, 9]] == 0)
    assert not np.any(np.isfinite(out.residual[[2, 9]]))


@every_backend
def test_an_overflow_keeps_the_last_finite_iterate(backend):
    out = run(backend, [[1e20]], [[1e20]], activation=jax.nn.relu, max_steps=1)
    assert out.status.tolist() == [Status.NONFINITE]
    assert out.num_steps.tolist() == [1]
    assert out.value.tolist() == [[np.float32(1e20)]]


@every_backend
def test_no_tolerance_is_a_budget(backend):
    out = run(
        backend, [[0.5]], [[1.0]], activation=None, rtol=0.0, atol=0.0, max_steps=7
    )
    assert (out.status.tolist(), out.num_steps.tolist()) == ([Status.SUCCESSFUL], [7])
    assert out.value.tolist() == [[2 - 2**-6]]


@every_backend
@pytest.mark.parametrize(("rtol", "atol"), [(-1e-2, 1.0), (1.0, -1e-2), (np.nan, 1.0)])
def test_a_tolerance_below_zero_or_none_is_never_reached(backend, rtol, atol):
    out = run(
        backend, [[0.5]], [[1.0]], activation=None, rtol=rtol, atol=atol, max_steps=7
    )
    assert out.status.tolist() == [Status.MAX_STEPS_REACHED]
    assert out.value.tolist() == [[2 - 2**-6]]


@every_backend
def test_extrapolation_of_a_linear_map_ends_as_gmres_does(getkey, backend):
    weight, u, _ = _problem(getkey(), 6, 3, gain=3.0)
    out = run(
        backend, weight, u, activation=None, history_length=4, rtol=1e-4, atol=1e-4
    )
    expected = np.linalg.solve(np.eye(3) - weight, u.T).T
    assert np.all(out.status == Status.SUCCESSFUL)
    assert np.all(out.num_steps <= 5)
    size = np.abs(expected).max(1, keepdims=True)
    inverse = np.linalg.norm(np.linalg.inv(np.eye(3) - weight), np.inf)
    assert np.all(np.abs(out.value - expected) < inverse * 1.1e-4 * (1 + size))


@every_kernel
@pytest.mark.parametrize(
    ("m", "damp", "dtype"),
    [
        (0, 0.3, jnp.float32),
        (0, 0.0, jnp.bfloat16),
        (2, 0.0, jnp.float32),
        (5, 0.2, jnp.bfloat16),
    ],
)
def test_ends_as_the_library_does(getkey, backend, dtype, m, damp):
    weight, u, _ = _problem(getkey(), 9, 8, gain=0.9)
    u[4, 4] = np.nan
    weight, u = jnp.asarray(weight, dtype), jnp.asarray(u, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    picard = eqlx.FixedPointIteration(tolerance, tolerance, damp=damp)
    solver = picard
    if m > 0:
        solver = eqlx.Anderson(tolerance, tolerance, history_length=m, damp=damp)
    cell = lambda z, x: jnp.tanh(weight @ z + x)

    @eqx.filter_vmap
    def solve(x):
        zero = jnp.zeros(x.shape, dtype)
        return eqlx.fixed_point(cell, solver, zero, x, max_steps=60, throw=False)

    sol = solve(u)
    out = run(
        backend,
        weight,
        u,
        rtol=tolerance,
        atol=tolerance,
        damp=damp,
        history_length=m,
        max_steps=60,
        dtype=dtype,
    )
    names = ["successful", "max_steps_reached", "nonfinite", "divergence", "stagnation"]
    items = [getattr(eqlx.RESULTS, name) for name in names]
    for row, status in enumerate(out.status):
        assert jax.tree.map(lambda x, row=row: x[row], sol.result) == items[status]
    assert np.abs(out.num_steps - sol.stats["num_steps"]).max() <= 1
    fine = np.arange(9) != 4
    assert np.allclose(out.value[fine], sol.value[fine], atol=3 * tolerance)


@pytest.mark.parametrize(("m", "damp"), [(1, 0.0), (3, 0.2), (5, 0.0)])
def test_far_from_the_solution_each_step_is_the_librarys(getkey, m, damp):
    # A gain of three, so that steps are taken back and histories begun anew. In double
    # precision twelve of them leave rounding errors small.
    weight, u, _ = map(jnp.asarray, _problem(getkey(), 12, 8, gain=3.0))
    solver = eqlx.Anderson(1e-6, 1e-6, history_length=m, damp=damp)
    cell = lambda z, x: jnp.tanh(weight @ z + x)

    @eqx.filter_vmap
    def solve(x):
        zero = jnp.zeros_like(x)
        return eqlx.fixed_point(cell, solver, zero, x, max_steps=12, throw=False)

    sol = solve(u)
    out = equilax_kernels.affine_fixed_point(
        weight,
        u,
        jnp.zeros_like(u),
        activation=jnp.tanh,
        rtol=1e-6,
        atol=1e-6,
        max_steps=12,
        damp=damp,
        history_length=m,
    )
    assert out.num_steps.tolist() == sol.stats["num_steps"].tolist()
    assert jnp.allclose(out.value, sol.value, rtol=0, atol=1e-7)


def test_weights_beyond_use_begin_a_history_anew(getkey):
    # Along the first feature the residual changes by a billionth a step, and the
    # extrapolation would go as far.
    weight = jnp.array([[1 - 1e-9, 0.0], [0.9, -0.2]])
    u = jr.uniform(getkey(), (16, 2), minval=0.5)
    solver = eqlx.Anderson(1e-6, 1e-6, history_length=3)
    cell = lambda z, x: jax.nn.relu(weight @ z + x)

    @eqx.filter_vmap
    def solve(x):
        zero = jnp.zeros_like(x)
        return eqlx.fixed_point(cell, solver, zero, x, max_steps=12, throw=False)

    sol = solve(u)
    assert jnp.sum(sol.stats["rejections"].degenerate) > 0
    options = {"rtol": 1e-6, "atol": 1e-6, "max_steps": 12, "history_length": 3}
    out = equilax_kernels.affine_fixed_point(
        weight, u, jnp.zeros_like(u), activation=jax.nn.relu, **options
    )
    assert jnp.allclose(out.value, sol.value, rtol=1e-5, atol=1e-5)
    assert out.num_steps.tolist() == sol.stats["num_steps"].tolist()


@every_backend
def test_extrapolation_does_not_depend_on_the_unit(getkey, backend):
    weight, u, _ = _problem(getkey(), 1, 4, gain=0.95)
    units = 2.0 ** np.array([[0], [-90], [60]])
    options = {"activation": None, "history_length": 3, "rtol": 1e-4, "atol": 0.0}
    out = run(backend, weight, units * u, **options)
    assert np.all(out.num_steps == out.num_steps[0])
    assert np.array_equal(out.value / units, np.stack([out.value[0]] * 3))


@every_backend
def test_half_precision_adds_up_in_single(backend):
    # The product is 1 + 2^-6 + 2^-14, and what is added to it all but the last.
    tick = 2.0**-7
    weight, u = [[0.0, 0.0], [1 + tick, 0.0]], [[1 + tick, -1 - 2 * tick]]
    out = run(
        backend, weight, u, activation=None, rtol=1e-2, atol=0.0, dtype=jnp.bfloat16
    )
    assert out.value.astype(np.float64).tolist() == [[1 + tick, tick**2]]
    assert out.num_steps.tolist() == [2]
