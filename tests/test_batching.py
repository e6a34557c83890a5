"""A vmapped solve: the values of single solves, one batch, nobody harmed."""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import (
    dense_sensitivity,
    each_with_one,
    every_solver,
    newton,
    optimised_hlo,
    relative_error,
    tanh_cell,
    tanh_problem,
)


_strategies = {
    "staged": eqlx.Staged(),
    "small_stages": eqlx.Staged(factor=4, min_size=1),
    "lockstep": eqlx.Lockstep(),
    "vmapped": eqlx.Vmapped(),
}
strategies = pytest.mark.parametrize(
    "batching", _strategies.values(), ids=list(_strategies)
)
# On a small batch the default has one stage, as `Lockstep` has.
_few = {name: b for name, b in _strategies.items() if name != "staged"}
few = pytest.mark.parametrize("batching", _few.values(), ids=list(_few))


def _affine(y, args):
    rate, shift = args
    return rate * y + shift


def _rates(size):
    """Slow and quick samples in turn, and none like another."""
    quick = jnp.linspace(0.05, 0.6, size)
    return jnp.where(jnp.arange(size) % 7 == 3, 0.98 - 0.01 * quick, quick)


def _solve_affine(rate, shift=1.0, *, batching=None, solver=None, **kwargs):
    return eqlx.fixed_point(
        _affine,
        eqlx.FixedPointIteration(0.0, 1e-9) if solver is None else solver,
        jnp.zeros(()),
        (rate, shift),
        max_steps=3000,
        batching=eqlx.Staged() if batching is None else batching,
        throw=False,
        **kwargs,
    )


def _num_steps(rate):
    """Of the iteration `y <- rate y + 1` from zero, whose residual is `rate^k`."""
    return int(np.ceil(np.log(1e-9) / np.log(float(rate))))


@strategies
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 64, 101])
def test_every_sample_takes_its_own_steps_to_its_own_value(batching, size):
    rates = _rates(size)
    solve = lambda rate: _solve_affine(rate, batching=batching)
    sol = jax.jit(jax.vmap(solve))(rates)
    assert np.allclose(sol.value, 1 / (1 - rates), rtol=1e-7, atol=0)
    assert sol.stats["num_steps"].tolist() == [_num_steps(r) for r in rates]
    assert sol.stats["num_fn_evals"].tolist() == [_num_steps(r) + 1 for r in rates]
    assert np.all(sol.result == eqlx.RESULTS.successful)
    true = np.abs(rates * sol.value + 1 - sol.value)
    assert np.max(np.abs(sol.stats["residual"] - true), initial=0) < 1e-14


@pytest.mark.parametrize(
    ("name", "strategy"),
    each_with_one(every_solver(0.0, 0.0), ["small_stages", "lockstep", "vmapped"]),
)
def test_a_batch_has_the_values_of_newton(getkey, name, strategy):
    batching = _strategies[strategy]
    num, size = 9, 6
    w, _ = tanh_problem(getkey(), size, 0.9)
    xs = jr.normal(getkey(), (num, size)) * jnp.linspace(0.01, 3, num)[:, None]
    solver = every_solver(0.0, 1e-11)[name]

    def solve(x):
        return eqlx.fixed_point(
            tanh_cell, solver, jnp.zeros(size), (w, x), batching=batching, throw=False
        )

    sol = jax.jit(jax.vmap(solve))(xs)
    expected = np.stack([newton(tanh_cell, jnp.zeros(size), (w, x)) for x in xs])
    assert np.max(np.abs(sol.value - expected)) < 1e-11 * size**0.5 / (1 - 0.9)
    assert len(set(sol.stats["num_steps"].tolist())) > 1
    if name == "traced":
        trace, steps = sol.stats["trace"], sol.stats["num_steps"]
        assert np.array_equal(np.sum(np.isfinite(trace), axis=1), steps + 1)
        last = jnp.take_along_axis(trace, steps[:, None], axis=1)[:, 0]
        assert np.array_equal(last, sol.stats["residual"])


_bad_maps = {
    "nan": (lambda y: jnp.where(y > 0.5, jnp.nan, 0.5 * y + 1), "nonfinite"),
    "infinite": (lambda y: jnp.where(y > 0.5, jnp.inf, 0.5 * y + 1), "nonfinite"),
    "divergent": (lambda y: 3 * y + 1, "divergence"),
    "slow": (lambda y: y + 1e-3, "max_steps_reached"),
}


def _mixed(bad):
    """A map that is `bad` where its parameter is 2, and `c y + 1` elsewhere."""
    return lambda y, c: jnp.where(c == 2, bad(y), c * y + 1)


@few
@pytest.mark.parametrize("bad", _bad_maps.values(), ids=list(_bad_maps))
def test_a_bad_sample_changes_no_other(batching, bad):
    bad_map, expected = bad
    solver = eqlx.FixedPointIteration(0.0, 1e-9)

    def solve(c):
        return eqlx.fixed_point(
            _mixed(bad_map),
            solver,
            jnp.zeros(()),
            c,
            max_steps=400,
            batching=batching,
            throw=False,
        )

    rates = _rates(17).at[3].set(0.9).at[10].set(0.93).at[5].set(2)
    good = np.arange(17) != 5
    sol = jax.jit(jax.vmap(solve))(rates)
    assert (sol.result == getattr(eqlx.RESULTS, expected))[5]
    assert np.all((sol.result == eqlx.RESULTS.successful)[good])
    assert np.allclose(sol.value[good], 1 / (1 - rates[good]), rtol=1e-6)
    assert sol.stats["num_steps"][good].tolist() == [_num_steps(r) for r in rates[good]]

    loss = lambda c: jnp.sum(jnp.where(good, jax.vmap(solve)(c).value, 0))
    grad = jax.jit(jax.grad(loss))(rates)
    assert np.allclose(grad[good], 1 / (1 - rates[good]) ** 2, rtol=1e-6)


@few
def test_three_bad_samples_at_once_in_float32(batching):
    # Each has a parameter by which the map tells it: not-a-number, divergent, slow.
    def fn(y, args):
        rate, shift = args
        y = jnp.where(rate == 5, jnp.where(y > 2, jnp.nan, y), y)
        return jnp.where(rate > 4, 1.5, rate) * y + shift

    def solve(rate, shift):
        solver = eqlx.FixedPointIteration(0.0, 1e-4)
        start = jnp.zeros((), jnp.float32)
        return eqlx.fixed_point(
            fn,
            solver,
            start,
            (rate, shift),
            max_steps=300,
            batching=batching,
            adjoint=eqlx.ImplicitAdjoint(
                eqlx.FixedPointLinearSolver(eqlx.Anderson(0.0, 1e-7))
            ),
            throw=False,
        )

    rates = jnp.linspace(0.05, 0.9, 33, dtype=jnp.float32)
    rates = rates.at[jnp.array([4, 17, 30])].set(jnp.array([5, 7, 0.9999], jnp.float32))
    names = {4: "nonfinite", 17: "divergence", 30: "max_steps_reached"}
    good = np.array([i for i in range(33) if i not in names])
    shift = jnp.float32(1)
    sol = jax.jit(jax.vmap(solve, (0, None)))(rates, shift)
    for i, name in names.items():
        assert (sol.result == getattr(eqlx.RESULTS, name))[i], name
    assert np.all((sol.result == eqlx.RESULTS.successful)[good])
    exact = np.asarray(rates, np.float64)[good]
    steps = np.ceil(np.log(1e-4) / np.log(exact)).astype(int)
    assert sol.stats["num_steps"][good].tolist() == steps.tolist()
    # The iterate after so many steps, in float64.
    value = (1 - exact**steps) / (1 - exact)
    assert np.allclose(sol.value[good], value, rtol=1e-6)

    def loss(rates, shift):
        return jnp.sum(jax.vmap(solve, (0, None))(rates, shift).value[good])

    grads = jax.jit(jax.grad(loss, (0, 1)))(rates, shift)
    assert np.all(np.isfinite(grads[0]))
    assert np.allclose(grads[0][good], value / (1 - exact), rtol=1e-6)
    assert np.allclose(grads[1], np.sum(1 / (1 - exact)), rtol=1e-6)


@few
@pytest.mark.parametrize("bad", _bad_maps.values(), ids=list(_bad_maps))
def test_a_bad_sample_stays_out_of_the_gradient_of_what_is_shared(batching, bad):
    # `b` is shared. A loss that leaves the bad sample out has a finite gradient.
    bad_map, _ = bad
    fn = lambda y, args: jnp.where(args[0] == 2, bad_map(y), args[0] * y + args[1])

    def solve(c, b):
        return eqlx.fixed_point(
            fn,
            eqlx.FixedPointIteration(0.0, 1e-9),
            jnp.zeros(()),
            (c, b),
            max_steps=400,
            batching=batching,
            throw=False,
        )

    rates = jnp.array([0.5, 2.0, 0.25])

    def loss(b):
        sol = jax.vmap(solve, in_axes=(0, None))(rates, b)
        is_good = sol.result == eqlx.RESULTS.successful
        return jnp.sum(jnp.where(is_good, sol.value, 0))

    assert np.allclose(jax.jit(jax.grad(loss))(1.0), 2 + 4 / 3, rtol=1e-7)


def test_a_backward_solve_that_fails_is_that_samples_alone():
    # The middle sample has the derivative 1 in `y`: its adjoint is singular.
    fn = lambda y, args: args[0] * y + args[1]
    rates, shifts = jnp.array([0.5, 1.0, 0.25]), jnp.array([1.0, 0.0, 1.0])

    def solve(c, b):
        solver = eqlx.FixedPointIteration(0.0, 1e-9)
        return eqlx.fixed_point(fn, solver, jnp.zeros(()), (c, b), throw=False).value

    grad = jax.jit(jax.grad(lambda b: jax.vmap(solve)(rates, b).sum()))(shifts)
    assert np.isnan(grad[1])
    assert np.allclose(grad[::2], [2, 4 / 3], rtol=1e-6)


_nestings = {
    "both": ((0, 0), (0, 0)),
    "outer_rates": ((0, None), (None, 0)),
    "outer_shifts": ((None, 0), (0, None)),
    "inner_last_axis": ((None, 0), (0, None)),
    "rates_twice": ((0, None), (0, 0)),
    "only_outer": ((0, 0), None),
}


@few
@pytest.mark.parametrize("axes", _nestings.values(), ids=list(_nestings))
def test_nested_vmaps(batching, axes):
    outer, inner = axes
    is_twice = [
        o is not None and bool(inner) and inner[i] is not None
        for i, o in enumerate(outer)
    ]
    rates = _rates(15)
    shapes = [
        (5, 3) if t else (5,) if outer[i] == 0 else (3,) for i, t in enumerate(is_twice)
    ]
    rate = rates[: int(np.prod(shapes[0]))].reshape(shapes[0])
    shift = jnp.linspace(1, 2, int(np.prod(shapes[1]))).reshape(shapes[1])
    solve = lambda r, s: _solve_affine(r, s, batching=batching)
    one = solve if inner is None else jax.vmap(solve, in_axes=inner)
    sol = jax.jit(jax.vmap(one, in_axes=outer))(rate, shift)
    full = []
    for i, x in enumerate((rate, shift)):
        x = np.asarray(x)
        if inner is not None and x.ndim == 1:
            x = x[:, None] if outer[i] == 0 else x[None, :]
        full.append(np.broadcast_to(x, sol.value.shape))
    assert sol.value.shape == ((5,) if inner is None else (5, 3))
    assert np.allclose(sol.value, full[1] / (1 - full[0]), rtol=1e-7)
    assert np.all(sol.result == eqlx.RESULTS.successful)


@few
def test_three_vmaps_and_axes_other_than_the_first(batching):
    rates = _rates(24).reshape(2, 3, 4)
    solve = lambda r: _solve_affine(r, batching=batching).value
    run = jax.vmap(jax.vmap(jax.vmap(solve), in_axes=1, out_axes=1), in_axes=2)
    out = jax.jit(run)(rates)
    assert np.allclose(out, np.moveaxis(1 / (1 - np.asarray(rates)), 2, 0), rtol=1e-7)


@few
def test_an_ensemble_of_large_parameters(getkey, batching):
    # A matrix to a model, a batch of inputs to each: the group axis.
    num_models, num, size = 3, 10, 8
    ws = jnp.stack([tanh_problem(getkey(), size, 0.9)[0] for _ in range(num_models)])
    xs = jr.normal(getkey(), (num, size)) * jnp.linspace(0.01, 3, num)[:, None]

    def solve(w, x):
        return eqlx.fixed_point(
            tanh_cell,
            eqlx.Anderson(0.0, 1e-11),
            jnp.zeros(size),
            (w, x),
            batching=batching,
            throw=False,
        ).value

    run = jax.vmap(jax.vmap(solve, in_axes=(None, 0)), in_axes=(0, None))
    out = jax.jit(run)(ws, xs)
    loss = lambda ws: jnp.sum(run(ws, xs))
    grad = jax.jit(jax.grad(loss))(ws)
    for i, w in enumerate(ws):
        expected = [newton(tanh_cell, jnp.zeros(size), (w, x)) for x in xs]
        assert np.allclose(out[i], np.stack(expected), atol=1e-9)
        parts = [
            dense_sensitivity(tanh_cell, z, (w, x))[0].sum(0)
            for z, x in zip(expected, xs, strict=True)
        ]
        assert relative_error(grad[i], sum(parts)) < 1e-8


@few
def test_a_batch_of_starts_alone(batching):
    # cos has one fixed point; from each start another way there.
    starts = jnp.linspace(-3, 3, 13)

    def solve(y0):
        return eqlx.fixed_point(
            lambda y, _: jnp.cos(y),
            eqlx.FixedPointIteration(0.0, 1e-12),
            y0,
            batching=batching,
            throw=False,
        )

    sol = jax.jit(jax.vmap(solve))(starts)
    assert np.allclose(sol.value, 0.7390851332151607, atol=1e-11)
    assert len(set(sol.stats["num_steps"].tolist())) > 1


@pytest.mark.parametrize("strategy", ["small_stages"])
def test_derivatives_in_any_nesting_with_vmap(strategy):
    batching = _strategies[strategy]
    rates = _rates(6)
    # The lean linear solver: a program of these is large enough.
    adjoint = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver())
    solve = lambda r: _solve_affine(r, batching=batching, adjoint=adjoint).value
    first, second = 1 / (1 - rates) ** 2, 2 / (1 - rates) ** 3
    total = lambda r: jnp.sum(jax.vmap(solve)(r))
    got = {
        "vmap of grad": jax.vmap(jax.grad(solve))(rates),
        "grad of vmap": jax.grad(total)(rates),
        "jvp of vmap": jax.jvp(jax.vmap(solve), (rates,), (jnp.ones(6),))[1],
        "vmap of jvp": jax.vmap(lambda r: jax.jvp(solve, (r,), (1.0,))[1])(rates),
    }
    for name, value in got.items():
        assert np.allclose(value, first, rtol=1e-6), name
    got = {
        "hessian of vmap": jnp.diagonal(jax.jit(jax.hessian(total))(rates)),
        "vmap of hessian": jax.jit(jax.vmap(jax.hessian(solve)))(rates),
        "grad of vmap of grad": jax.jit(
            jax.grad(lambda r: jnp.sum(jax.vmap(jax.grad(solve))(r)))
        )(rates),
    }
    for name, value in got.items():
        assert np.allclose(value, second, rtol=1e-5), name


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("anderson", "5,32"),
        ("type_i", "5,32"),
        ("broyden", "10,32"),
        ("bad_broyden", "10,32"),
        ("traced", "41"),
    ],
)
def test_a_history_is_written_in_place(name, row):
    # Rings of 5 x B x d and traces of 41 x B are the largest arrays: a copy of one in a
    # loop body would cost more than the step.
    size, num = 32, 16
    w = 0.01 * jnp.ones((size, size), jnp.float32)

    def solve(x):
        return eqlx.fixed_point(
            tanh_cell,
            every_solver(0.0, 1e-6)[name],
            jnp.zeros(size, jnp.float32),
            (w, x),
            max_steps=40,
            throw=False,
        ).stats

    text = optimised_hlo(jax.vmap(solve), jnp.ones((num, size), jnp.float32))
    length, *rest = row.split(",")
    ring = f"f32[{num},{row}]"
    other = f"f32[{','.join([length, str(num), *rest])}]"
    assert ring in text or other in text
    bodies = [part for part in text.split("\n\n") if "dynamic-update-slice" in part]
    assert bodies
    for part in bodies:
        for line in part.splitlines():
            is_copy = " copy(" in line and (ring in line or other in line)
            assert not is_copy, line


def test_shared_parameters_are_neither_copied_nor_gathered():
    size, num = 24, 64
    w = 0.01 * jnp.ones((size, size), jnp.float32)

    def solve(w, x):
        return eqlx.fixed_point(
            tanh_cell,
            eqlx.FixedPointIteration(0.0, 1e-6),
            jnp.zeros(size, jnp.float32),
            (w, x),
            throw=False,
        ).value

    run = jax.vmap(solve, in_axes=(None, 0))
    text = optimised_hlo(run, w, jnp.ones((num, size), jnp.float32))
    for batch in (64, 16, 8):
        assert f"f32[{batch},{size},{size}]" not in text


def test_the_stages_shrink_to_the_smallest_size():
    assert eqlx.Staged().sizes(256) == (256, 32, 4)
    assert eqlx.Staged(4, 8).sizes(8) == (8,)
    assert eqlx.Staged(8, 8).sizes(0) == (0,)
    for size in (5, 7, 9, 64, 101, 1000, 4096):
        for factor, least in ((2, 1), (4, 8), (8, 4)):
            sizes = eqlx.Staged(factor, least).sizes(size)
            assert sizes[0] == size
            assert sizes[-1] == min(least, size)
            for a, b in zip(sizes, sizes[1:], strict=False):
                assert b < a <= factor * (b + 1)


def test_the_cost_of_a_slow_sample_is_its_own():
    # Counted where it is paid: each evaluation of a row tells a counter of its size.
    rows = []

    def fn(y, c):
        out = c * y + 1
        return out

    def counting(batching):
        rows.clear()
        rates = jnp.full(64, 0.3).at[17].set(0.99)

        def solve(c):
            def counted(y, c):
                jax.debug.callback(lambda x: rows.append(None), y)
                return fn(y, c)

            return eqlx.fixed_point(
                counted,
                eqlx.FixedPointIteration(0.0, 1e-9),
                jnp.zeros(()),
                c,
                max_steps=4000,
                batching=batching,
                throw=False,
            ).stats["num_fn_evals"]

        needed = int(jax.jit(jax.vmap(solve))(rates).sum())
        jax.effects_barrier()
        return len(rows) / needed

    assert counting(eqlx.Lockstep()) > 30
    assert counting(eqlx.Staged(4, 1)) < 1.5


def test_collectives_over_the_vmapped_axis_are_for_vmapped_alone():
    def solve(batching, xs):
        def one(x):
            fn = lambda y, x: 0.25 * y + 0.25 * jax.lax.pmean(y, "batch") + x
            solver = eqlx.FixedPointIteration(0.0, 1e-10)
            return eqlx.fixed_point(
                fn, solver, jnp.zeros(()), x, batching=batching, throw=False
            ).value

        return jax.vmap(one, axis_name="batch")(xs)

    # y = (x + mean(y) / 4) / (3 / 4), and mean(y) = 2 mean(x).
    expected = (np.array([1.0, 2.0, 3.0]) + 4 / 4) / 0.75
    xs = jnp.array([1.0, 2.0, 3.0])
    assert np.allclose(solve(eqlx.Vmapped(), xs), expected, atol=1e-8)
    # The sum of y is twice that of x.
    grad = jax.grad(lambda xs: solve(eqlx.Vmapped(), xs).sum())(xs)
    assert np.allclose(grad, 2, atol=1e-8)
    for batching in (eqlx.Staged(), eqlx.Lockstep()):
        with pytest.raises(ValueError, match=r"`batching=equilax.Vmapped\(\)`"):
            solve(batching, xs)
