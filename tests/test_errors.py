"""Wrong calls fail at trace time, with the argument, what came, what was expected."""

# The calls are wrong on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import equilax as eqlx
import jax
import jax.numpy as jnp
import jaxtyping
import lineax as lx
import numpy as np
import pytest


_solver = eqlx.FixedPointIteration(1e-6, 1e-6)


@pytest.fixture(autouse=True)
def _without_checked_types():
    """Users do not have the runtime type checks that the tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _call(fn=lambda y, _: 0.5 * y, y0=None, solver=_solver, **kwargs):
    y0 = jnp.ones(3, jnp.float32) if y0 is None else y0
    return eqlx.fixed_point(fn, solver, y0, **kwargs)


_wrong_calls = {
    "structure": (
        dict(fn=lambda y, _: (y, y)),
        ValueError,
        r"`fn` must return the structure of `y0`; got\s.*\(\*, \*\).*expected",
    ),
    "none": (dict(fn=lambda y, _: None), ValueError, "`fn` must return the structure"),
    "shape": (
        dict(fn=lambda y, _: y[:2]),
        ValueError,
        r"`fn` .*shapes and dtypes of `y0`; got float32\[2\], expected float32\[3\]",
    ),
    "broadcast": (
        dict(fn=lambda y, _: y[None] + jnp.ones((2, 3), jnp.float32)),
        ValueError,
        r"got float32\[2, 3\], expected float32\[3\]",
    ),
    "dtype": (
        dict(fn=lambda y, _: y.astype(jnp.float16)),
        ValueError,
        r"got float16\[3\], expected float32\[3\]",
    ),
    "leaf": (
        dict(
            fn=lambda y, _: {"a": y["a"], "b": y["b"][:1]},
            y0={"a": jnp.ones(3), "b": jnp.ones(2)},
        ),
        ValueError,
        r"in the leaf at \['b'\]",
    ),
    "aux": (dict(has_aux=True), ValueError, r"`fn` must return a pair `\(y, aux\)`"),
    "integers": (
        dict(y0=jnp.arange(3)),
        TypeError,
        "`y0` must be .*floating-point or complex.*dtype int",
    ),
    "a_python_integer": (dict(y0=1), TypeError, "`y0` must be .*dtype int"),
    "booleans": (dict(y0=jnp.array([True])), TypeError, "`y0` must be .*dtype bool"),
    "text": (dict(y0="a"), TypeError, "`y0` must be .*'a'"),
    "empty": (dict(y0=()), ValueError, r"`y0` must have at least one array; got.*\(\)"),
    "empty_dict": (dict(y0={"a": None}), ValueError, "`y0` must have at least one"),
    "no_steps": (
        dict(max_steps=0),
        ValueError,
        "`max_steps` must be an integer of at least 1; got 0",
    ),
    "fractional_steps": (dict(max_steps=2.5), ValueError, "`max_steps` .* got 2.5"),
    "true_steps": (dict(max_steps=True), ValueError, "`max_steps` .* got True"),
    "fn": (dict(fn=3), TypeError, "`fn` must be callable.*got 3"),
    "solver_class": (
        dict(solver=eqlx.Anderson),
        TypeError,
        "`solver` must be an instance of `AbstractFixedPointSolver`.*pass the class",
    ),
    "adjoint": (dict(adjoint=lx.LU()), TypeError, "`adjoint` must be an instance"),
    "batching": (dict(batching="staged"), TypeError, "`batching` must .*'staged'"),
    "throw": (dict(throw=1), TypeError, "`throw` must be an instance of `bool`"),
}


@pytest.mark.parametrize(
    ("kwargs", "kind", "match"), _wrong_calls.values(), ids=list(_wrong_calls)
)
def test_wrong_calls(kwargs, kind, match):
    with pytest.raises(kind, match=f"(?s){match}"):
        _call(**kwargs)


_wrong_knobs = {
    "rtol": (lambda: eqlx.FixedPointIteration(-1e-3, 1e-3), "`rtol` must not be neg"),
    "atol": (lambda: eqlx.Anderson(1e-3, -1.0), "`atol` must not be neg.*got -1.0"),
    "nan": (lambda: eqlx.Anderson(float("nan"), 1.0), "`rtol` must not be neg.*nan"),
    "numpy": (
        lambda: eqlx.FixedPointIteration(np.float32(-1), np.float32(0)),
        "`rtol` must not be neg",
    ),
    "vector": (
        lambda: eqlx.Anderson(jnp.ones(2), 0.0),
        r"`rtol` must be one number; got one of shape \(2,\)",
    ),
    "text": (lambda: eqlx.Anderson("1e-3", 1e-3), "`rtol` must be a real number"),
    "none": (lambda: eqlx.FixedPointIteration(1e-3, None), "`atol` must be a real"),
    "damp": (
        lambda: eqlx.FixedPointIteration(0.1, 0.1, damp=1.0),
        r"`damp` .*\[0, 1\)",
    ),
    "negative_damp": (lambda: eqlx.Anderson(0.1, 0.1, damp=-0.5), r"`damp` .*\[0, 1\)"),
    "history": (
        lambda: eqlx.Anderson(0.1, 0.1, history_length=0),
        "`history_length` must be an integer of at least 1; got 0",
    ),
    "ridge": (lambda: eqlx.Anderson(0.1, 0.1, ridge=-1.0), "`ridge` must not be neg"),
    "factor": (lambda: eqlx.Staged(factor=1), "`factor` .* at least 2; got 1"),
    "min_size": (lambda: eqlx.Staged(min_size=0), "`min_size` .* at least 1; got 0"),
    "terms": (lambda: eqlx.Neumann(-1), "`num_terms` .* at least 0; got -1"),
    "neumann_damp": (lambda: eqlx.Neumann(1, 1.0), r"`damp` .*\[0, 1\); got 1"),
    "checkpoints": (
        lambda: eqlx.RecursiveCheckpointAdjoint(0),
        "`checkpoints` .* at least 1; got 0",
    ),
    "wrapped": (lambda: eqlx.BestSoFar(3), "`solver` must be an instance.*got 3"),
    "wrapped_class": (lambda: eqlx.Traced(eqlx.Anderson), "`solver` .*pass the class"),
    "linear_solver": (lambda: eqlx.ImplicitAdjoint("gmres"), "`linear_solver` must be"),
    "adjoint_steps": (
        lambda: eqlx.FixedPointLinearSolver(max_steps=0),
        "`max_steps` .* at least 1; got 0",
    ),
    "adjoint_solver": (
        lambda: eqlx.FixedPointLinearSolver(lx.GMRES(rtol=1e-3, atol=1e-3)),
        "`solver` must be an instance of `AbstractFixedPointSolver`",
    ),
    "cell": (
        lambda: eqlx.nn.FixedPointLayer(3, _solver),
        "`cell` must be callable.*got 3",
    ),
    "layer_solver": (
        lambda: eqlx.nn.FixedPointLayer(lambda z, x: z, eqlx.Anderson),
        "`solver` must .*pass the class",
    ),
    "layer_steps": (
        lambda: eqlx.nn.FixedPointLayer(lambda z, x: z, _solver, max_steps=0),
        "`max_steps` .* at least 1; got 0",
    ),
    "features": (
        lambda: eqlx.nn.AffineCell(3, 0, key=jax.random.key(0)),
        "`features` .* at least 1; got 0",
    ),
    "activation": (
        lambda: eqlx.nn.AffineCell(3, 3, "tanh", key=jax.random.key(0)),
        "`activation` must be callable.*'tanh'",
    ),
}


@pytest.mark.parametrize(
    ("make", "match"), _wrong_knobs.values(), ids=list(_wrong_knobs)
)
def test_wrong_knobs_fail_at_construction(make, match):
    with pytest.raises((ValueError, TypeError), match=f"(?s){match}"):
        make()


def _layer():
    cell = eqlx.nn.AffineCell(4, 6, key=jax.random.key(0))
    return eqlx.nn.FixedPointLayer(cell, _solver)


def test_a_start_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"(?s)`z0` has .*\(5,\).*`cell.init\(x\)`"):
        _layer()(jnp.ones(4), z0=jnp.zeros(5))
    with pytest.raises(ValueError, match="(?s)`z0` has "):
        _layer()(jnp.ones(4), z0={"a": jnp.zeros(6)})


def test_a_batch_where_a_sample_belongs():
    with pytest.raises(ValueError, match=r"`x` must have the shape \(4,\).*jax.vmap"):
        _layer()(jnp.ones((2, 4)))


def test_a_state_that_cannot_be_guessed():
    layer = eqlx.nn.FixedPointLayer(lambda z, x: 0.5 * z + jnp.sum(x), _solver)
    assert layer(jnp.ones(3)).shape == (3,)
    w = jnp.ones((5, 5)) / 10
    layer = eqlx.nn.FixedPointLayer(lambda z, x: w @ z + jnp.sum(x), _solver)
    with pytest.raises(ValueError, match="(?s)`z0` was not given.*pass `z0`"):
        layer(jnp.ones(3))
    layer = eqlx.nn.FixedPointLayer(lambda z, x: jnp.zeros(5) + jnp.sum(x), _solver)
    with pytest.raises(ValueError, match="(?s)`z0` was not given.*pass a `z0`"):
        layer(jnp.ones(3))


def test_wrong_calls_fail_while_tracing():
    with pytest.raises(ValueError, match="`fn` must return the shapes"):
        jax.jit(lambda y: _call(fn=lambda y, _: y[:2], y0=y).value).lower(jnp.ones(3))
    with pytest.raises(ValueError, match="`fn` must return the shapes"):
        jax.eval_shape(lambda y: _call(fn=lambda y, _: y[:2], y0=y).value, jnp.ones(3))


def test_numbers_of_numpy_and_python_are_welcome():
    sol = _call(y0=np.ones(3, np.float32), max_steps=np.int64(200))
    assert sol.value.dtype == jnp.float32
    assert _call(y0=1.0).value.shape == ()
    fn = lambda y, _: [0.5 * y[0], 0.5 * y[1]]
    assert _call(fn, y0=[1.0, np.float32(2)]).value[1].dtype == jnp.float32


_bad_adjoints = {
    "preconditioner": (
        lambda: eqlx.ImplicitAdjoint(eqlx.KrylovLinearSolver(), 3),
        TypeError,
        "`preconditioner` must be callable",
    ),
    "preconditioned_lu": (
        lambda: eqlx.ImplicitAdjoint(lx.LU(), lambda v, y, args: v),
        ValueError,
        "`preconditioner` needs a matrix-free",
    ),
    "fallback": (
        lambda: eqlx.FallbackLinearSolver(lx.LU()),
        TypeError,
        "`first` must be an instance",
    ),
    "shared_lu": (
        lambda: eqlx.SharedInverseAdjoint(lx.LU()),
        TypeError,
        "`linear_solver` must be matrix-free",
    ),
    "growth": (
        lambda: eqlx.SharedInverseAdjoint(max_growth=-1.0),
        ValueError,
        "`max_growth`",
    ),
    "policy": (
        lambda: eqlx.ImplicitAdjoint(on_failure="zero"),
        TypeError,
        "`on_failure` must be one of `equilax.OnFailure.nan`",
    ),
    "shared_anderson": (
        lambda: _call(
            solver=eqlx.Anderson(0.0, 1e-6), adjoint=eqlx.SharedInverseAdjoint()
        ),
        TypeError,
        "`adjoint=SharedInverseAdjoint.*needs a `solver` with an estimate.*Anderson",
    ),
    "preconditioned_shape": (
        lambda: _call(
            adjoint=eqlx.ImplicitAdjoint(
                eqlx.KrylovLinearSolver(), lambda v, y, args: v[:1]
            )
        ),
        ValueError,
        "`preconditioner` must return",
    ),
    "monitor": (
        lambda: _call(monitor=eqlx.AdjointMonitor),
        TypeError,
        "`monitor` must be an instance.*class",
    ),
    "monitor_shape": (
        lambda: _call(monitor=eqlx.AdjointMonitor(num_steps=jnp.zeros(3))),
        ValueError,
        r"`monitor.num_steps` must be one number.*\(3,\)",
    ),
    "monitor_checkpoint": (
        lambda: _call(
            monitor=eqlx.AdjointMonitor(), adjoint=eqlx.RecursiveCheckpointAdjoint()
        ),
        ValueError,
        "RecursiveCheckpointAdjoint.*has no linear solve.*`monitor`",
    ),
    "tags": (lambda: _call(tags=1), TypeError, "`tags` must be an instance"),
    "monitor_solution": (
        lambda: _call(monitor=eqlx.AdjointMonitor(solution=jnp.zeros(2, jnp.float32))),
        ValueError,
        r"`monitor.solution` must have the shapes.*float32\[2\].*float32\[3\]",
    ),
}


@pytest.mark.parametrize("name", list(_bad_adjoints))
def test_bad_adjoints_say_what_was_expected(name):
    run, error, match = _bad_adjoints[name]
    with pytest.raises(error, match=match):
        run()


def test_wrong_calls_of_the_adjoint_solve():
    y = jnp.ones(3, jnp.float32)
    call = lambda solver, cotangent, **kwargs: eqlx.solve_adjoint(
        lambda y, _: 0.5 * y, solver, y, cotangent, **kwargs
    )
    with pytest.raises(ValueError, match=r"`cotangent` must have the shapes.*\[2\]"):
        call(_solver, y[:2])
    with pytest.raises(ValueError, match="`guess` must have the structure"):
        call(_solver, y, guess=(y,))
    with pytest.raises(TypeError, match="`adjoint` must be an instance"):
        call(_solver, y, adjoint=eqlx.RecursiveCheckpointAdjoint())
    adjoint = eqlx.SharedInverseAdjoint()
    with pytest.raises(ValueError, match="`state` must be"):
        call(eqlx.Broyden(0.0, 1e-6), y, adjoint=adjoint)
    cell, adjoint = (lambda z, x: 0.5 * z + x), eqlx.RecursiveCheckpointAdjoint()
    layer = eqlx.nn.FixedPointLayer(cell, _solver, adjoint=adjoint)
    with pytest.raises(TypeError, match="no linear solve"):
        layer.solve_adjoint(y, y, y)
