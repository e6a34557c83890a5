"""What nobody should hand in: each call ends in a right answer or in a clear error.

Clear is a `TypeError` or a `ValueError` whose message has the name of the argument in
backticks. `EQUILAX_EXAMPLES=2000 pytest tests/property` draws 2,000 examples in this
folder.
"""

import inspect
import warnings

import equilax as eqlx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given

from .profile import examples
from .surface import CONSTRUCTORS, FUNCTIONS, ODD, STATES, towards_two


@pytest.fixture(autouse=True, scope="module")
def _without_checked_types():
    """Users do not have the runtime type checks that the tests run under."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# A function of the user's that raises does so in its own words.
_USERS = ("activation", "fn", "loss", "output", "cell", "injection")


def _is_skipped(name: str, odd: str) -> bool:
    return name in _USERS and callable(ODD.get(odd))


def _attempt(call, name: str, others: tuple[str, ...] = ()):
    """The result of a call, or `None` after a clear error."""
    with warnings.catch_warnings():
        # Of Equinox, that what is static should not be an array. The error follows.
        warnings.filterwarnings("ignore", message=".*being set as static")
        try:
            return call()
        except (TypeError, ValueError) as error:
            message = str(error)
    assert any(f"`{n}" in message for n in (name, *others)), message
    return None


@pytest.mark.parametrize("new", CONSTRUCTORS, ids=lambda new: new.__name__)
def test_constructors(new):
    good = CONSTRUCTORS[new]
    assert set(good) == set(inspect.signature(new).parameters)
    new(**good)
    for name in good:
        for odd, value in ODD.items():
            if not _is_skipped(name, odd):
                _attempt(lambda n=name, v=value: new(**(good | {n: v})), name)


def test_every_constructor_is_in_the_table():
    made = {new.__name__ for new in CONSTRUCTORS}
    given = {name for space in (eqlx, eqlx.nn) for name in dir(space)}
    given = {n for n in given if n[0].isupper() and not n.startswith("Abstract")}
    # What the library makes, and what takes nothing.
    given -= {"AdjointMonitor", "EquilibriumSigns", "ErrorBound", "Solution", "Terms"}
    given -= {"FullStep", "Lockstep", "OnFailure", "RESULTS", "Vmapped"}
    assert given - made == {"AffineMap", "FusedEnd"}


def _arguments():
    for function, (_, good, _) in FUNCTIONS.items():
        for name in good:
            is_state = name in ("y0", "y", "x")
            for odd in [*ODD, *(STATES if is_state else ())]:
                if not _is_skipped(name, odd):
                    yield function, name, odd


# Of a state that is refused the layer speaks as the core does.
_ALSO = {"z0": ("y0",), "x": ("y0", "z0"), "adjoint": ("state",)}


@given(st.sampled_from(list(_arguments())))
@examples(60, 0.3)
def test_functions(chosen):
    function, name, odd = chosen
    call, good, expected = FUNCTIONS[function]
    value = ODD[odd] if odd in ODD else STATES[odd]
    out = _attempt(lambda: call(**(good | {name: value})), name, _ALSO.get(name, ()))
    if (
        out is None
        or expected is None
        or name in ("in_axes", "decay", "points")
        or "norm" in function
    ):
        return
    _check_answer(function, out, expected, value, is_state=name in ("y0", "z0"))


def _check_answer(function, out, expected, value, *, is_state):
    if isinstance(out, eqlx.Solution):
        if not bool(np.all(out.result == eqlx.RESULTS.successful)):
            return
        out = out.value
    is_given = is_state and function in ("iterates", "layer")
    # These say no more than the value, which is lost if the start is.
    inputs = [np.asarray(x) for x in jax.tree.leaves(value)] if is_given else []
    is_lost = any(not np.all(np.isfinite(x)) for x in inputs)
    for leaf in jax.tree.leaves(out):
        leaf = np.asarray(leaf).astype(complex)
        # A norm of nothing is zero.
        is_zero = function in ("spectral_radius", "jacobian_penalty") and leaf == 0
        assert is_lost or np.all(is_zero) or np.allclose(leaf, expected, atol=1e-2)


@pytest.mark.parametrize("solver", [eqlx.Anderson, eqlx.FixedPointIteration])
@pytest.mark.parametrize("knob", ["damp", "rtol", "atol"])
def test_a_traced_knob_that_is_no_number_is_no_success(solver, knob):
    y0 = jnp.zeros(3, jnp.float32)

    @jax.jit
    def run(value):
        knobs = dict(rtol=1e-5, atol=1e-5, damp=0.1) | {knob: value}
        return eqlx.fixed_point(towards_two, solver(**knobs), y0, throw=False)

    with pytest.raises(ValueError, match=f"`{knob}`"):
        solver(**(dict(rtol=1e-5, atol=1e-5) | {knob: jnp.array(jnp.nan)}))
    sol = run(jnp.nan)
    is_right = bool(jnp.allclose(sol.value, 2, atol=1e-4))
    assert is_right or sol.result != eqlx.RESULTS.successful


def test_buffers_given_away_and_static_fields():
    solver = eqlx.Anderson(0.0, 1e-6)
    # A label among `args` is no array, and stays as it is.
    fn = lambda y, args: 0.5 * y + args["x"] if args["label"] == "a" else y

    def run(y0, x):
        args = {"x": x, "label": "a", "nothing": None}
        return eqlx.fixed_point(fn, solver, y0, args, throw=False).value

    x = jnp.arange(1.0, 4.0)
    for order in (slice(None), slice(None, None, -1)):
        y0 = jnp.zeros(3)
        value = jax.jit(run, donate_argnums=0)(y0, x[order])
        assert jnp.allclose(value, 2 * x[order], atol=1e-5)
        assert y0.is_deleted()


def test_keys_among_the_arguments():
    def fn(y, args):
        key, scale = args
        return 0.5 * y + scale * jax.random.normal(key, y.shape)

    solver, y0 = eqlx.Anderson(0.0, 1e-9), jnp.zeros(3)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        loss = lambda s, k=key: jnp.sum(eqlx.fixed_point(fn, solver, y0, (k, s)).value)
        expected = 2 * jnp.sum(jax.random.normal(key, (3,)))
        value, grad = jax.value_and_grad(loss)(jnp.array(1.0))
        assert jnp.allclose(value, expected)
        assert jnp.allclose(grad, expected)
    keys = jax.random.split(jax.random.key(1), 3)
    solve = lambda k: eqlx.fixed_point(fn, solver, y0, (k, jnp.array(1.0))).value
    draw = lambda k: 2 * jax.random.normal(k, (3,))
    assert jnp.allclose(jax.vmap(solve)(keys), jax.vmap(draw)(keys))
