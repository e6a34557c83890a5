"""What the errors of failed solves say, of the kinds that `tests/README.md` lists."""

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
            r"fixed-point solve failed for 1 of 4 samples\.\n`divergence`: ",
        ),
        (
            [0.5, 0.25, 1.0, 0.1],
            [1.0, 1.0, 0.0, 1.0],
            r"linear solve of a derivative failed for 1 of 4 samples\.",
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
