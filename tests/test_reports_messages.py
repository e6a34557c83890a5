"""What the errors of failed solves say, of the kinds that `tests/README.md` lists."""

import os
import subprocess
import sys

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest


_SOLVER = eqlx.FixedPointIteration(0.0, 1e-8)
_LEAN = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_SOLVER))


def _loss(rates, shifts, throw):
    def one(rate, shift):
        fn = lambda y, p: p[0] * y + p[1]
        return eqlx.fixed_point(
            fn, _SOLVER, jnp.zeros(()), (rate, shift), adjoint=_LEAN, throw=throw
        )

    sol = jax.vmap(one)(rates, shifts)
    return jnp.sum(sol.value), sol


def _run(rates, shifts, throw=True):
    grad = jax.jit(jax.value_and_grad(_loss, 1, has_aux=True), static_argnums=2)
    return jax.block_until_ready(
        eqx.filter(grad(jnp.array(rates), jnp.array(shifts), throw), eqx.is_array)
    )


@pytest.mark.parametrize(
    ("rates", "shifts", "match"),
    [
        # A forward solve that diverges, and one that stands still, but has no adjoint.
        (
            [0.5, 0.25, 2.0, 0.1],
            [1.0] * 4,
            r"fixed-point solve failed for 1 of 4 samples\.\n`divergence`: .*\n"
            r"The first is sample 2, after 27 steps, with a residual of 1\.\n",
        ),
        (
            [0.5, 0.25, 1.0, 0.1],
            [1.0, 1.0, 0.0, 1.0],
            r"linear solve of a derivative failed for 1 of 4 samples\.\n.*\n"
            r"The first is sample 2, after \d+ steps, with a residual of 1\.\n",
        ),
    ],
    ids=["forward", "backward"],
)
def test_an_error_names_the_pass_and_how_many_samples_failed(rates, shifts, match):
    with pytest.raises(Exception, match=match):
        _run(rates, shifts)


def test_which_sample_failed_and_when_stands_in_the_solution():
    (_, sol), grad = _run([0.5, 0.25, 2.0, 0.1], [1.0] * 4, throw=False)
    failed = np.asarray(sol.result != eqlx.RESULTS.successful)
    assert np.flatnonzero(failed).tolist() == [2]
    # The residual is 2^k after k steps, and divergence more than 1e8 of the first.
    assert sol.stats["num_steps"][2] == 27
    # The value returned is that of the smallest.
    assert sol.stats["residual"][2] == 1
    assert np.allclose(grad[~failed], [2, 4 / 3, 1 / 0.9], rtol=1e-6)


def _fails(rate, max_steps=30):
    """The plain iteration: after `k` steps the residual is `rate**k`."""
    solver = eqlx.FixedPointIteration(0.0, 1e-8)
    fn = lambda y, r: r * y + 1
    return eqlx.fixed_point(fn, solver, jnp.zeros(()), rate, max_steps=max_steps).value


_RATES = [[0.1, 0.2, 0.3, 0.1], [0.1, 0.9, 0.2, 0.8], [0.1, 0.9, 0.1, 0.1]]


@pytest.mark.parametrize(
    ("run", "rates", "about"),
    [
        (_fails, 0.9, "failed.\n{}\nAfter 30 steps, with a residual of 0.0424.\n"),
        (
            jax.vmap(jax.vmap(_fails)),
            _RATES,
            "failed for 3 of 12 samples.\n{}\n"
            "The first is sample (1, 1), after 30 steps, with a residual of 0.0424.\n",
        ),
        (
            jax.vmap(jax.vmap(_fails), 1),
            _RATES,
            "failed for 3 of 12 samples.\n{}\n"
            "The first is sample (1, 1), after 30 steps, with a residual of 0.0424.\n",
        ),
        (
            jax.vmap(jax.vmap(jax.vmap(_fails))),
            [[[0.1], [0.2]], [[0.3], [0.9]]],
            "failed for 1 of 4 samples.\n{}\nThe first is sample (1, 1, 0), after ",
        ),
    ],
    ids=["lone", "nested", "other axes", "thrice"],
)
def test_an_error_names_the_first_that_failed_and_when(run, rates, about):
    with pytest.raises(Exception, match="failed") as error:
        jax.block_until_ready(jax.jit(run)(jnp.array(rates)))
    head, tail = about.split("{}")
    message = str(error.value)
    start = message.index(head)
    assert "`max_steps_reached`: " in message[start:]
    assert tail in message[start:]


def test_each_failure_has_a_message_of_its_own():
    run = jax.jit(_fails)
    for rate in (0.9, 0.8, 0.95):
        with pytest.raises(Exception, match=f"residual of {rate**30:.3g}"):
            jax.block_until_ready(run(rate))


def test_where_errors_are_turned_off_there_is_no_callback():
    code = (
        "import equilax as eqlx, jax, jax.numpy as jnp\n"
        "solver = eqlx.FixedPointIteration(0.0, 1e-8)\n"
        "solve = lambda a: eqlx.fixed_point(lambda y, a: a * y + 1, solver, 0 * a, a)\n"
        "run = jax.jit(lambda a: solve(a).value)\n"
        "assert 'callback' not in run.lower(2.0).as_text()\n"
        "print(run(2.0), run(0.5))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"EQX_ON_ERROR": "nan"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == ["nan", "2.0"]
