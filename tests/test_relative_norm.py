import equilax as eqlx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P


_IN_NUMPY = {
    "max": (eqlx.max_norm, lambda x: np.max(np.abs(x), initial=0.0)),
    "two": (eqlx.two_norm, lambda x: np.sqrt(np.sum(np.abs(x) ** 2))),
    "rms": (eqlx.rms_norm, lambda x: np.sqrt(np.mean(np.abs(x) ** 2))),
}
_TARGET = np.array([3.0, -1e-3, 0.0, 1e-6])


def _halfway(y, target):
    """Its iterates are `target + (y0 - target) / 2**k`."""
    return (y + target) / 2


def _steps(norm, rtol, atol, start, target):
    """The first iterate that passes, by the closed form."""
    for k in range(100):
        y = target + (start - target) / 2**k
        residual = norm((target - y) / 2)
        if residual < atol + rtol * norm(y):
            return k, residual
    raise AssertionError


@pytest.mark.parametrize("name", _IN_NUMPY)
@pytest.mark.parametrize(("rtol", "atol"), [(1e-6, 0.0), (0.0, 1e-5), (1e-5, 1e-5)])
def test_it_stops_at_the_first_iterate_that_passes_as_a_whole(name, rtol, atol):
    norm, in_numpy = _IN_NUMPY[name]
    solver = eqlx.FixedPointIteration(rtol, atol, norm=eqlx.RelativeToNorm(norm))
    start = np.ones(4)
    steps, residual = _steps(in_numpy, rtol, atol, start, _TARGET)
    sol = eqlx.fixed_point(_halfway, solver, jnp.asarray(start), jnp.asarray(_TARGET))
    assert sol.stats["num_steps"] == steps
    assert jnp.allclose(sol.stats["residual"], residual, rtol=1e-9)
    assert np.allclose(sol.value, _TARGET + (start - _TARGET) / 2**steps, rtol=1e-12)


@pytest.mark.parametrize("name", _IN_NUMPY)
def test_all_leaves_are_one_whole_and_magnitudes_count(name):
    norm, in_numpy = _IN_NUMPY[name]
    solver = eqlx.FixedPointIteration(1e-6, 0.0, norm=eqlx.RelativeToNorm(norm))
    target = _TARGET * np.exp(1j * np.arange(4))
    steps, _ = _steps(in_numpy, 1e-6, 0.0, np.ones(4), target)
    split = lambda y: {"a": jnp.asarray(y[:1]), "b": (jnp.asarray(y[1:]),)}

    def fn(y, target):
        return jax.tree.map(_halfway, y, target)

    start = split(np.ones(4, complex))
    sol = eqlx.fixed_point(fn, solver, start, split(target))
    assert sol.stats["num_steps"] == steps


def test_an_element_that_tends_to_zero_holds_nothing_up():
    target = jnp.array([1.0, 0.0])
    steps = {}
    for norm in (eqlx.max_norm, eqlx.RelativeToNorm()):
        solver = eqlx.FixedPointIteration(1e-6, 0.0, norm=norm)
        sol = eqlx.fixed_point(
            _halfway, solver, jnp.full(2, 0.5), target, max_steps=100, throw=False
        )
        steps[norm] = int(sol.stats["num_steps"])
    assert steps[eqlx.max_norm] == 100
    # |f - y| = 2**-(k + 2) and |y| is just below one.
    assert steps[eqlx.RelativeToNorm()] == 18


def test_a_state_of_zero_that_does_not_move_has_converged():
    solver = eqlx.FixedPointIteration(1e-6, 0.0, norm=eqlx.RelativeToNorm())
    sol = eqlx.fixed_point(_halfway, solver, jnp.zeros(3), jnp.zeros(3))
    assert sol.stats["num_steps"] == 0
    empty = eqlx.fixed_point(_halfway, solver, jnp.zeros(0), jnp.zeros(0))
    assert empty.result == eqlx.RESULTS.successful


@pytest.mark.parametrize("norm", [eqlx.max_norm, eqlx.two_norm], ids=["max", "two"])
@pytest.mark.parametrize("lost", [jnp.nan, jnp.inf])
def test_what_is_not_finite_never_passes(norm, lost):
    solver = eqlx.FixedPointIteration(1e-6, 1e-6, norm=eqlx.RelativeToNorm(norm))
    target = jnp.array([1.0, lost])
    sol = eqlx.fixed_point(_halfway, solver, jnp.ones(2), target, throw=False)
    assert sol.result == eqlx.RESULTS.nonfinite


@pytest.mark.parametrize("norm", [eqlx.max_norm, eqlx.rms_norm], ids=["max", "rms"])
def test_a_state_that_is_split_is_one_whole(norm):
    solver = eqlx.FixedPointIteration(
        1e-6, 0.0, norm=eqlx.RelativeToNorm(norm), axis_name="part"
    )
    in_numpy = {v[0]: v[1] for v in _IN_NUMPY.values()}[norm]
    steps, _ = _steps(in_numpy, 1e-6, 0.0, np.ones(4), _TARGET)

    def solve(y, target):
        sol = eqlx.fixed_point(_halfway, solver, y, target, throw=False)
        return sol.value, sol.stats["num_steps"]

    mesh = jax.make_mesh((2,), ("part",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        solve, mesh=mesh, in_specs=P("part"), out_specs=(P("part"), P())
    )
    value, num_steps = jax.jit(sharded)(jnp.ones(4), jnp.asarray(_TARGET))
    assert num_steps == steps
    assert np.allclose(value, _TARGET + (1 - _TARGET) / 2**steps, rtol=1e-12)


def test_the_adjoint_may_be_measured_by_it_too():
    norm = eqlx.RelativeToNorm(eqlx.two_norm)
    solver = eqlx.Anderson(1e-12, 0.0, norm=norm)
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))
    rng = np.random.default_rng(0)
    w = 0.2 * rng.normal(size=(6, 6))
    b = rng.normal(size=6)

    def fn(y, args):
        w, b = args
        return w @ y + b

    def first(b):
        args = (jnp.asarray(w), b)
        return eqlx.fixed_point(fn, solver, jnp.zeros(6), args, adjoint=adjoint).value[
            0
        ]

    expected = np.linalg.inv(np.eye(6) - w)[0]
    assert np.allclose(jax.grad(first)(jnp.asarray(b)), expected, rtol=1e-9)


def test_it_is_the_norm_inside():
    x = jnp.array([3.0, -4.0])
    assert eqlx.RelativeToNorm()(x) == 4
    assert eqlx.RelativeToNorm(eqlx.two_norm)(x) == 5


def test_a_norm_that_knows_no_mesh_axes_is_refused_for_a_state_that_is_split():
    norm = eqlx.RelativeToNorm(lambda y: jnp.max(jnp.abs(y)))
    with pytest.raises(ValueError, match="`norm` must be callable as `norm\\(y, axis"):
        eqlx.FixedPointIteration(1e-6, 0.0, norm=norm, axis_name="part")


def test_what_is_no_norm_is_refused():
    with pytest.raises(TypeError, match="norm"):
        eqlx.RelativeToNorm(2.0)  # pyright: ignore
