"""What the loop of a lone problem knows: that it runs no pass of one that has ended."""

import equilax as eqlx
import jax
import jax.extend as jex
import jax.numpy as jnp
import pytest


def _loops(jaxpr):
    """The bodies of all `while_loop`s, of loops within loops too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            yield eqn.params["body_jaxpr"].jaxpr
        for inner in jex.core.jaxprs_in_params(eqn.params):
            yield from _loops(inner)


def _first_flag(fn, *args):
    """Whether the body of each loop reads the first flag in its carry."""
    for body in _loops(jax.make_jaxpr(fn)(*args).jaxpr):
        flags = [v for v in body.invars if v.aval.dtype == bool]
        if flags:
            yield any(v is flags[0] for eqn in body.eqns for v in eqn.invars)


def _solve(**options):
    """By a solver without a state, so that the flag is that of the solve."""
    fn = lambda z, _: jnp.tanh(0.5 * z) + 1
    solver = eqlx.FixedPointIteration(1e-5, 1e-5)
    return lambda z: eqlx.fixed_point(fn, solver, z, **options).value


def test_a_lone_solve_does_not_ask_whether_it_is_live():
    assert list(_first_flag(_solve(), jnp.ones(3))) == [False]


@pytest.mark.parametrize("batching", [eqlx.Lockstep(), eqlx.Staged(min_size=1)])
def test_a_batch_asks_it_of_each_sample(batching):
    solve = jax.vmap(_solve(batching=batching))
    assert set(_first_flag(solve, jnp.ones((4, 3)))) == {True}
    solve = _solve(batching=batching, batch_axis=0)
    assert set(_first_flag(solve, jnp.ones((4, 3)))) == {True}


def test_gmres_alone_does_not_ask_it_either():
    def solve(vector):
        mv = lambda x: x - 0.5 * jnp.roll(x, 1)
        solver = eqlx.KrylovLinearSolver()
        return solver.solve(mv, vector, eqlx.Terms(1e-5)).value

    assert list(_first_flag(solve, jnp.ones(3))) == [False]
    assert set(_first_flag(jax.vmap(solve), jnp.ones((4, 3)))) == {True}
