"""Penalties, spectral radii, points of trajectories and signs of an equilibrium."""

# Some calls are wrong on purpose.
# pyright: reportArgumentType=false

import itertools

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
import scipy.linalg
from equilax._diagnostics.hessenberg import radius_of
from jax import export
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import newton, relative_error, tanh_cell, tanh_problem


_linear = lambda y, a: a @ y


def _signs(size):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=size)))


def _mean_square(fn, y, args):
    """The squared Frobenius norm over the number of unknowns, by a dense Jacobian."""
    return jnp.sum(jax.jacfwd(fn)(y, args) ** 2) / y.size


def test_the_penalty_is_exact_over_all_signs(getkey, monkeypatch):
    w, x = tanh_problem(getkey(), 5, 0.9)
    y, key = jr.normal(getkey(), (5,)), getkey()
    # The mean over all vectors of signs is the expectation.
    monkeypatch.setattr(jr, "rademacher", lambda *_: jnp.asarray(_signs(5)))
    run = lambda y, args: eqlx.jacobian_penalty(
        tanh_cell, y, args, key=key, num_samples=32
    )
    got = jax.jit(jax.value_and_grad(run, (0, 1)))(y, (w, x))
    expected = jax.value_and_grad(lambda *a: _mean_square(tanh_cell, *a), (0, 1))(
        y, (w, x)
    )
    assert relative_error(got, expected) < 1e-13


def test_the_penalty_is_right_in_the_mean(getkey):
    w, x = tanh_problem(getkey(), 6, 0.9)
    y = jr.normal(getkey(), (6,))
    jacobian = np.asarray(jax.jacfwd(tanh_cell)(y, (w, x)))
    run = lambda key: eqlx.jacobian_penalty(tanh_cell, y, (w, x), key=key)
    got = np.asarray(jax.vmap(run)(jr.split(getkey(), 4000)))
    gram = jacobian @ jacobian.T
    # Hutchinson's variance with signs: twice the squares off the diagonal.
    deviation = np.sqrt(2 * (np.sum(gram**2) - np.sum(np.diag(gram) ** 2))) / 6
    assert np.isclose(np.std(got), deviation, rtol=0.1)
    assert abs(np.mean(got) - np.trace(gram) / 6) < 4 * deviation / np.sqrt(4000)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_the_penalty_of_a_tree(getkey, dtype):
    # Each row has one entry, of which every vector of signs gives the square.
    y = {"a": jnp.ones(3, dtype), "b": jnp.ones((2, 2), dtype)}
    scale = jnp.asarray(-0.5 if dtype != jnp.complex64 else 0.3 + 0.4j, dtype)

    def fn(y, c):
        return {"a": c * y["a"], "b": (c + c) * y["b"].T}, "aux"

    got = eqlx.jacobian_penalty(fn, y, scale, key=getkey(), has_aux=True)
    assert got.dtype == jnp.float32
    assert np.isclose(got, (3 * 0.25 + 4 * 1.0) / 7, rtol=1e-6)


def _rotation(radius, angle):
    c, s = np.cos(angle), np.sin(angle)
    return radius * np.array([[c, -s], [s, c]])


def test_the_radius_of_a_rotation_is_its_factor(getkey):
    # Of which the power method says 0.486 for some angle and start.
    run = jax.jit(lambda a, k: eqlx.spectral_radius(_linear, jnp.ones(2), a, key=k))
    for angle in (0.0, 0.3, 1.0, np.pi / 2, 2.5, np.pi):
        got = run(jnp.asarray(_rotation(0.9, angle)), getkey())
        assert abs(got - 0.9) < 1e-14


def test_the_radius_is_exact_with_all_steps(getkey):
    matrices = [
        jr.normal(getkey(), (8, 8)),
        jnp.triu(jr.normal(getkey(), (8, 8))),
        jnp.diag(jnp.array([-3.0, 3.0, 2.0, 1.0, 0, 0, 0, 0])),
        jnp.ones((8, 8)),
        # Of rank one and far from normal: after two steps all is rounding.
        jnp.zeros((8, 8)).at[0].set(jnp.array([1.0, *[30.0] * 7])),
        jnp.zeros((8, 8)),
        1e-200 * jr.normal(getkey(), (8, 8)),
        1e200 * jr.normal(getkey(), (8, 8)),
        jnp.asarray(np.kron(np.eye(4), _rotation(0.7, 1.0))),
    ]
    run = lambda a, key: eqlx.spectral_radius(
        lambda y, a: _linear(y, a), jnp.ones(8), a, key=key, num_steps=20
    )
    got = jax.jit(jax.vmap(run))(jnp.stack(matrices), jr.split(getkey(), 9))
    for a, radius in zip(matrices, got, strict=True):
        values, vectors = np.linalg.eig(np.asarray(a))
        expected = np.max(np.abs(values))
        # By Bauer and Fike.
        tol = 100 * np.finfo(float).eps * np.linalg.cond(vectors)
        assert abs(radius - expected) <= tol * np.linalg.norm(a, 2), a


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_radius_of_a_small_matrix(getkey, dtype):
    q = np.linalg.qr(np.asarray(jr.normal(getkey(), (6, 6))))[0]
    upper = np.triu(np.asarray(jr.normal(getkey(), (6, 6))), 1)
    cycle = jnp.roll(jnp.eye(6), 1, 0)  # On which the usual shift gets nowhere.
    known = [
        (cycle, 1),
        (1e-30 * cycle, 1e-30),
        (1e30 * cycle, 1e30),
        (jnp.eye(6) + jnp.eye(6, k=1), 1),
        (jnp.eye(6, k=1), 0),
        (jnp.zeros((6, 6)), 0),
        (cycle.at[0, 0].set(jnp.nan), np.nan),
    ]
    made, tols = [], [40.0] * len(known)
    for largest in ([2.0, -2.0], [0.0, 2.0], [2.0, 1.99]):
        matrix = q @ (np.diag([*largest, 1.0, 0.5, 0.1, 0.0]) + upper) @ q.T
        made.append((jnp.asarray(scipy.linalg.hessenberg(matrix)), 2))
        # By Bauer and Fike, with the norm of a few.
        tols.append(200 * np.linalg.cond(np.linalg.eig(matrix)[1]))
    matrices = jnp.stack([matrix for matrix, _ in known + made]).astype(dtype)
    got = np.asarray(jax.jit(jax.vmap(radius_of))(matrices), np.float64)
    expected = np.array([radius for _, radius in known + made])
    tols = np.array(tols) * float(jnp.finfo(dtype).eps)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    is_number = ~np.isnan(expected)
    assert np.all((np.abs(got - expected) <= tols * expected)[is_number])


def test_few_steps_find_what_stands_out(getkey):
    # Of a normal matrix: a complex pair at 0.95, and forty values up to 0.5.
    q = jnp.linalg.qr(jr.normal(getkey(), (42, 42)))[0]
    blocks = jnp.diag(jnp.concatenate([jnp.zeros(2), jnp.linspace(-0.5, 0.5, 40)]))
    a = q @ blocks.at[:2, :2].set(_rotation(0.95, 1.2)) @ q.T
    run = lambda key: eqlx.spectral_radius(_linear, jnp.ones(42), a, key=key)
    got = np.asarray(jax.vmap(run)(jr.split(getkey(), 20)))
    # The rest falls by 0.5 / 0.95 a step, squared for a normal matrix: 16 steps.
    assert np.all(np.abs(got - 0.95) < 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_the_radius_of_a_tree(getkey, dtype):
    c = jnp.asarray(-0.5 if dtype == jnp.bfloat16 else 0.3 + 0.4j, dtype)
    y = {"a": jnp.ones(3, dtype), "b": jnp.ones((1, 3), dtype)}

    # Two copies of the eigenvalues of [[0, 4 c], [c, 0]]: plus and minus 2 c.
    def fn(y, c):
        return {"a": 4 * c * y["b"][0], "b": c * y["a"][None]}, None

    got = eqlx.spectral_radius(fn, y, c, key=getkey(), has_aux=True)
    assert got.dtype == jnp.float32
    assert np.isclose(got, 1.0, rtol=4 * float(jnp.finfo(dtype).eps), atol=0)


def test_the_radius_has_no_derivative(getkey):
    w, x = tanh_problem(getkey(), 4, 0.8)
    y, key = jr.normal(getkey(), (4,)), getkey()
    run = lambda y, w: eqlx.spectral_radius(
        lambda y, x: tanh_cell(y, (w, x)), y, x, key=key
    )
    value, grads = jax.value_and_grad(run, (0, 1))(y, w)
    jacobian = np.asarray(jax.jacfwd(tanh_cell)(y, (w, x)))
    assert np.isclose(value, np.max(np.abs(np.linalg.eigvals(jacobian))), rtol=1e-9)
    assert not np.any(grads[0])
    assert not np.any(grads[1])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_radius_and_the_penalty_can_be_exported(platform, dtype):
    def run(y, a, key):
        figures = eqlx.spectral_radius, eqlx.jacobian_penalty
        return jnp.stack([figure(_linear, y, a, key=key) for figure in figures])

    y, a, key = jnp.ones(2, dtype), jnp.asarray(_rotation(0.9, 1.0), dtype), jr.key(0)
    exported = export.export(jax.jit(run), platforms=[platform])(y, a, key)
    assert "custom_call" not in exported.mlir_module().replace("@Sharding", "")
    if platform == "cpu":
        radius, penalty = exported.call(y, a, key)
        eps = float(jnp.finfo(dtype).eps)
        assert np.isclose(radius, 0.9, rtol=2 * eps)
        # All singular values are 0.9, but the mean is over signs.
        assert penalty >= 0


def test_in_shard_map(getkey):
    mesh = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Explicit,))
    w, _ = tanh_problem(getkey(), 3, 0.8)
    xs, keys = jr.normal(getkey(), (8, 3)), jr.split(getkey(), 8)

    def one(w, x, key):
        y = jnp.zeros(3)
        radius = eqlx.spectral_radius(tanh_cell, y, (w, x), key=key)
        penalty = eqlx.jacobian_penalty(tanh_cell, y, (w, x), key=key, num_samples=3000)
        solver = eqlx.Anderson(0.0, 1e-9)
        path = eqlx.iterates(tanh_cell, solver, y, (w, x), indices=(20,))
        return radius, penalty, path[0]

    each = jax.vmap(one, in_axes=(None, 0, 0))
    run = jax.shard_map(
        each, mesh=mesh, in_specs=(P(), P("b"), P("b")), out_specs=P("b")
    )
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    got = jax.jit(run)(place(w, P()), place(xs, P("b")), place(keys, P("b")))
    for x, radius, penalty, y in zip(xs, *(np.asarray(g) for g in got), strict=True):
        jacobian = np.asarray(jax.jacfwd(tanh_cell)(jnp.zeros(3), (w, x)))
        expected = np.max(np.abs(np.linalg.eigvals(jacobian)))
        assert np.isclose(radius, expected, rtol=1e-9)
        # Five deviations of the mean, each at most sqrt(2) of the penalty.
        assert np.isclose(penalty, np.sum(jacobian**2) / 3, rtol=5 * (2 / 3000) ** 0.5)
        assert np.allclose(y, newton(tanh_cell, jnp.zeros(3), (w, x)), atol=1e-8)


def _unrolled(y, args, indices, damp=0.3):
    """The points of the damped iteration, by a loop in Python."""
    points = []
    for k in range(max(indices) + 1):
        if k in indices:
            points.append(y)
        y = (1 - damp) * tanh_cell(y, args) + damp * y
    return jnp.stack(points)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3, 6, 9), range(2, 7, 2)])
def test_points_of_a_trajectory_and_their_gradients(getkey, indices):
    w, x = tanh_problem(getkey(), 4, 0.9)
    y0, target = jr.normal(getkey(), (4,)), jr.normal(getkey(), (4,))
    solver = eqlx.FixedPointIteration(0.0, 0.0, damp=0.3)
    loss = lambda y: jnp.sum((y - target) ** 2)

    def ours(y0, args):
        points = eqlx.iterates(tanh_cell, solver, y0, args, indices=indices)
        return eqlx.correction_loss(loss, points, decay=0.7), points

    def unrolled(y0, args):
        points = _unrolled(y0, args, indices)
        n = len(indices)
        weights = [0.7 ** (n - 1 - i) for i in range(n)]
        return sum(w * loss(p) for w, p in zip(weights, points, strict=True)), points

    both = [
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(y0, (w, x))
        for f in (ours, unrolled)
    ]
    assert relative_error(*both) < 1e-13
    tangents = (y0, (w, x))
    pair = [
        jax.jvp(lambda *a, f=f: f(*a)[0], tangents, tangents)[1]
        for f in (ours, unrolled)
    ]
    assert relative_error(*pair) < 1e-13


def test_points_of_a_solve_that_converges_stay(getkey):
    w, x = tanh_problem(getkey(), 4, 0.9)
    xs = jnp.stack([x, 0 * x, 2 * x])
    solver = eqlx.Anderson(0.0, 1e-8)

    def total(x):
        points = eqlx.iterates(
            tanh_cell, solver, jnp.zeros(4), (w, x), indices=(0, 30, 60)
        )
        return jnp.sum(points[2]), points

    run = jax.jit(jax.vmap(jax.value_and_grad(total, has_aux=True)))
    (_, points), grads = run(xs)
    assert np.array_equal(points[:, 1], points[:, 2])
    assert not np.any(points[:, 0])
    assert not np.any(points[1])
    for x, point, grad in zip(xs, points[:, 1], grads, strict=True):
        y = newton(tanh_cell, point, (w, x))
        assert np.allclose(point, y, atol=1e-7)
        # Through all these steps the derivative is that of the solution.
        slopes = np.diag(1 - np.asarray(y) ** 2)
        exact = np.linalg.solve(np.eye(4) - slopes @ w, slopes).sum(0)
        assert np.allclose(grad, exact, atol=1e-4) or not np.any(x)


def test_points_of_a_tree_in_half_precision():
    fn = lambda y, c: ({"a": c * y["a"], "b": y["b"] + c}, 3)
    y0 = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros((), jnp.bfloat16)}
    c = jnp.asarray(0.5, jnp.bfloat16)
    solver = eqlx.FixedPointIteration(0.0, 0.0)
    points = eqlx.iterates(fn, solver, y0, c, indices=range(1, 4), has_aux=True)
    assert points["a"].dtype == points["b"].dtype == jnp.bfloat16
    assert np.array_equal(points["a"], [[0.5] * 2, [0.25] * 2, [0.125] * 2])
    assert np.array_equal(points["b"], [0.5, 1, 1.5])


def test_signs_of_a_contraction(getkey):
    # Its solution is known, and the same from everywhere.
    a = jr.normal(getkey(), (3, 3))
    a = 0.5 * a / jnp.linalg.norm(a, 2)
    bs = jr.normal(getkey(), (4, 3))
    solver = eqlx.Anderson(0.0, 1e-10)
    run = lambda b, starts: eqlx.equilibrium_signs(
        lambda y, b: a @ y + b, solver, jnp.zeros(3), b, starts=starts
    )
    starts = 3 * jr.normal(getkey(), (4, 5, 3))
    signs = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(bs, starts))
    for i, b in enumerate(bs):
        y = np.linalg.solve(np.eye(3) - a, b)
        change = np.linalg.norm(y - b) / max(np.linalg.norm(y), np.linalg.norm(b))
        assert np.isclose(signs.change_from_image[i], change, atol=1e-8)
    assert np.allclose(signs.change_from_start, 1)
    assert np.all(signs.spread < 1e-8)
    assert np.all(signs.num_equilibria == 1)
    assert np.all(signs.num_failed == 0)
    assert np.allclose(signs.alignment, 1)


def test_signs_of_two_equilibria():
    solver = eqlx.FixedPointIteration(0.0, 1e-10)
    fn = lambda y, args: {"z": jnp.tanh(args * y["z"])}
    y0, starts = {"z": jnp.full(2, 0.1)}, {"z": jnp.array([[-1.0, -1], [2, 3], [1, 0]])}
    run = lambda gain, y0: eqlx.equilibrium_signs(
        fn, solver, y0, gain, starts=starts, output=lambda y: jnp.sum(y["z"])
    )
    run = jax.jit(run)
    signs = run(3.0, y0)
    z = 1.0
    for _ in range(60):
        z = np.tanh(3 * z)
    # From (1, 0) the second stays at zero: a third one.
    assert signs.num_equilibria == 3
    assert np.isclose(signs.spread, 2)
    assert np.allclose(signs.alignment, [-1, 1, 0.5**0.5])
    assert np.isclose(signs.change_from_start, (z - 0.1) / z)
    assert np.isclose(signs.change_from_image, (z - np.tanh(0.3)) / z)
    assert signs.num_failed == 0
    # A gain of one half leaves zero alone, of which only the errors are seen.
    signs = run(0.5, {"z": jnp.zeros(2)})
    assert signs.num_equilibria == 1
    assert signs.spread < 1e-7
    assert signs.change_from_start == 0


def test_signs_of_a_solver_that_does_nothing(getkey):
    starts = jnp.array([[2.0, 0], [0, -1], [1, 0]])
    signs = eqlx.equilibrium_signs(
        lambda y, _: y, eqlx.Anderson(0.0, 1e-6), jnp.array([1.0, 0]), starts=starts
    )
    assert signs.change_from_start == signs.change_from_image == 0
    assert signs.num_equilibria == 3
    # Of orthogonal ones: the root of the sum of squares over the larger.
    assert np.isclose(signs.spread, 2**0.5)
    assert np.allclose(signs.alignment, [1, 0, 1])
    # Nothing converges: no equilibrium, nothing to be apart.
    signs = eqlx.equilibrium_signs(
        lambda y, _: (y + 1, None),
        eqlx.FixedPointIteration(0.0, 1e-6),
        jnp.array([1.0, 0]),
        starts=starts,
        max_steps=5,
        has_aux=True,
    )
    assert (signs.num_failed, signs.num_equilibria, signs.spread) == (4, 0, 0)


@pytest.fixture
def _without_checked_types():
    """Users do not have the runtime type checks that the tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


_half = lambda y, _: 0.5 * y
_solver = eqlx.FixedPointIteration(0.0, 1e-6)
_of_jacobian = dict(fn=_half, y=jnp.ones(3), key=jr.key(0))
_of_solve = dict(fn=_half, solver=_solver, y0=jnp.ones(3))
_starts, _steps = dict(starts=jnp.ones((2, 3))), dict(indices=(1, 2))
_wrong_calls = [
    (eqlx.jacobian_penalty, _of_jacobian | dict(fn=3), "`fn` must be callable"),
    (eqlx.jacobian_penalty, _of_jacobian | dict(key=3), "`key` must be a PRNG key.*3"),
    (
        eqlx.spectral_radius,
        _of_jacobian | dict(key=jr.split(jr.key(0), 2)),
        r"`key` must be one PRNG key; got keys of the shape \(2,\)",
    ),
    (
        eqlx.jacobian_penalty,
        _of_jacobian | dict(num_samples=0),
        "`num_samples` must be .* at least 1; got 0",
    ),
    (eqlx.spectral_radius, _of_jacobian | dict(num_steps=1.5), "`num_steps` .*1.5"),
    (eqlx.spectral_radius, _of_jacobian | dict(y=jnp.arange(3)), "`y` must be .*int"),
    (
        eqlx.jacobian_penalty,
        _of_jacobian | dict(fn=lambda y, _: y[:2]),
        r"`fn` must return the shapes and dtypes of `y`; got float64\[2\]",
    ),
    (eqlx.iterates, _of_solve | dict(indices=()), r"`indices` .*got \(\)"),
    (eqlx.iterates, _of_solve | dict(indices=5), "`indices` must be a sequence.*got 5"),
    (eqlx.iterates, _of_solve | dict(indices=(2, 1)), r"`indices` must rise.*\[2, 1\]"),
    (
        eqlx.iterates,
        _of_solve | dict(indices=(-1, 1)),
        "`indices` .*at least 0; got -1",
    ),
    (eqlx.iterates, _of_solve | _steps | dict(solver=3), "`solver` must be an inst"),
    (
        eqlx.correction_loss,
        dict(loss=lambda y: y, points=jnp.ones((2, 3))),
        r"`loss` must return a scalar; got the shape \(3,\)",
    ),
    (
        eqlx.correction_loss,
        dict(loss=jnp.sum, points=jnp.ones((2, 3)), decay=1.5),
        "`decay` .*1.5",
    ),
    (
        eqlx.equilibrium_signs,
        _of_solve | dict(starts=jnp.ones(3)),
        r"`starts` must be like `y0` .*float64\[3\], expected float64\['num', 3\]",
    ),
    (
        eqlx.equilibrium_signs,
        _of_solve | dict(starts=[jnp.ones((2, 3))]),
        "`starts` must have the structure of `y0`",
    ),
    (
        eqlx.equilibrium_signs,
        _of_solve | _starts | dict(tolerance=-1.0),
        "`tolerance` must not be negative; got -1.0",
    ),
    (eqlx.equilibrium_signs, _of_solve | _starts | dict(output=1), "`output` must be"),
]


@pytest.mark.usefixtures("_without_checked_types")
@pytest.mark.parametrize(("function", "kwargs", "match"), _wrong_calls)
def test_wrong_calls(function, kwargs, match):
    with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
        function(**kwargs)
