"""What becomes of a sample under `vmap`: finished, guarded, masked, beside others.

Of the kinds that `tests/README.md` lists.
"""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import batch_reference, every_solver, relative_error, tanh_problem
from .hlo import program


_PICARD = eqlx.FixedPointIteration(0.0, 1e-10)
_LEAN = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_PICARD))
_affine = lambda y, p: p[0] * y + p[1]


def _solve(rate, shift, adjoint=_LEAN):
    return eqlx.fixed_point(
        _affine,
        _PICARD,
        jnp.zeros(()),
        (rate, shift),
        max_steps=400,
        adjoint=adjoint,
        throw=False,
    )


@pytest.mark.parametrize("name", list(every_solver(0.0, 0.0)))
def test_all_of_a_solution_has_a_batch_axis(name):
    def solve(x):
        fn = lambda y, x: 0.5 * jnp.cos(y) + x
        solver = every_solver(0.0, 1e-8)[name]
        return eqlx.fixed_point(fn, solver, jnp.zeros(3), x, throw=False)

    shapes = jax.eval_shape(jax.vmap(solve), jnp.ones((4, 3)))
    assert shapes.value.shape == (4, 3)
    leaves = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    assert all(shape[:1] == (4,) for shape in leaves)
    # And one of a scan, with everything in it.
    scan = lambda xs: jax.lax.scan(lambda carry, x: (carry, solve(x)), 0, xs)[1]
    scanned = jax.eval_shape(scan, jnp.ones((4, 3)))
    assert [leaf.shape for leaf in jax.tree.leaves(scanned)] == leaves


@pytest.mark.parametrize("batching", [eqlx.Staged(2, 1), eqlx.Lockstep()])
def test_a_finished_sample_is_not_taken_further(batching):
    # The second element counts steps, and `fn` refuses to be where none should lead.
    needed = lambda rate: jnp.ceil(jnp.log(1e-10) / jnp.log(rate))

    def fn(y, rate):
        y = eqx.error_if(y, y[1] > needed(rate), "taken beyond its end")
        return jnp.stack([rate * y[0] + 1, y[1] + 1])

    first = lambda difference: jnp.abs(difference[0])
    solver = eqlx.FixedPointIteration(0.0, 1e-10, norm=first)

    def solve(rate):
        start = jnp.zeros(2)
        return eqlx.fixed_point(
            fn, solver, start, rate, max_steps=400, batching=batching, throw=False
        ).value

    rates = jnp.array([0.1, 0.9, 0.3, 0.5, 0.2])
    got = jax.jit(jax.vmap(solve))(rates)
    assert np.array_equal(got[:, 1], needed(rates))
    assert np.array_equal(got, np.stack([solve(rate) for rate in rates]))


def test_a_solve_behind_a_guard_ends_for_those_it_is_kept_from():
    # Under `vmap` both branches run for every sample.
    def guarded(rate, shift):
        solve = lambda: _solve(rate, shift).value
        return jax.lax.cond(rate < 1, solve, lambda: -shift)

    rates, shift = jnp.array([0.5, 2.0, 0.25, 1.0, jnp.nan]), jnp.array(1.0)
    run = jax.jit(jax.vmap(guarded, (0, None)))
    assert np.allclose(run(rates, shift), [2, -1, 4 / 3, -1, -1], rtol=1e-8)
    loss = lambda rates, shift: jnp.sum(run(rates, shift))
    of_rates, of_shift = jax.jit(jax.grad(loss, (0, 1)))(rates, shift)
    assert np.allclose(of_rates, [4, 0, 16 / 9, 0, 0], rtol=1e-7)
    assert np.isclose(of_shift, 2 - 1 + 4 / 3 - 1 - 1, rtol=1e-7)


@pytest.mark.parametrize(
    "linear_solver",
    [eqlx.FixedPointLinearSolver(_PICARD), eqlx.KrylovLinearSolver(1e-10)],
)
def test_samples_that_a_loss_leaves_out_send_back_zero(linear_solver):
    adjoint = eqlx.ImplicitAdjoint(linear_solver)
    rates, mask = jnp.array([0.5, 0.75, 0.9]), jnp.array([0.0, 1.0, 0.0])
    solve = lambda rate: _solve(rate, 1.0, adjoint=adjoint).value
    loss = lambda rates: jnp.sum(mask * jax.vmap(solve)(rates))
    grad = jax.jit(jax.grad(loss))(rates)
    assert np.isclose(grad[1], 16, rtol=1e-7)
    assert grad[0] == grad[2] == 0


def test_slow_and_quick_rows_of_one_state_are_all_held_to_the_tolerance():
    rates, shift = jnp.array([0.1, 0.5, 0.9, 0.99]), jnp.ones(4)

    def solve(rates):
        return eqlx.fixed_point(
            _affine,
            _PICARD,
            jnp.zeros(4),
            (rates, shift),
            max_steps=4000,
            adjoint=eqlx.ImplicitAdjoint(
                eqlx.FixedPointLinearSolver(_PICARD, max_steps=4000)
            ),
            throw=False,
        )

    loss = lambda rates: (lambda sol: (jnp.sum(sol.value), sol))(solve(rates))
    (_, sol), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(rates)
    assert sol.result == eqlx.RESULTS.successful
    assert np.max(np.abs(sol.value - 1 / (1 - rates))) < 1e-10 / (1 - 0.99)
    assert np.allclose(grad, 1 / (1 - rates) ** 2, rtol=1e-6)


def test_a_batch_that_jax_partitions_is_not_gathered_in_a_loop(getkey):
    # `shard_map` needs no collective at all: tests/test_transforms.py.
    w, x = tanh_problem(getkey(), 4, 0.5)
    xs = jnp.linspace(-1, 2, 8)[:, None] * x[None]
    mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    args = place(w, P()), place(xs, P("b"))

    def run(batching):
        def one(w, x):
            fn = lambda z, p: jnp.tanh(p[0] @ z + p[1])
            return eqlx.fixed_point(
                fn, _PICARD, jnp.zeros(4), (w, x), batching=batching, throw=False
            ).value

        return jax.jit(jax.vmap(one, (None, 0)))

    expected = batch_reference(w, xs)[0]
    for batching in (eqlx.Lockstep(), eqlx.Staged()):
        assert relative_error(run(batching)(*args), expected) < 1e-9
        compiled = program(run(batching), *args)
        # Whether all are done, and nothing of the state.
        assert set(compiled.in_loops()) <= {"all-reduce"}
        gathers = compiled.all().count("all-gather")
        # The slow samples, on their way to the next stage.
        assert gathers <= (2 if isinstance(batching, eqlx.Staged) else 0)
