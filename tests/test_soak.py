"""Thousands of solves in a loop, and a thousand steps of training: nothing piles up."""

import functools as ft
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .helpers import Counted


_NUM_WARM_UP = 1_000
_NUM_SOLVES = 10_000
_SIZE = 4
# In what the process holds of memory. One array kept by each solve would be 4 MiB and
# more, an entry of a cache far more than that.
_BOUND = 2 << 20
_STATM = Path("/proc/self/statm")


def _affine(z, args):
    w, x = args
    return w * z + x


def _inputs(i: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Another `y0`, `w` and `x` each time, of one shape."""
    numbers = 0.1 * (i % 7), 0.1 + 0.05 * (i % 9), 1.0 + i % 13
    y0, w, x = jax.device_put([np.full(_SIZE, n) for n in numbers])
    return y0, w, x


def _check(value, i: int) -> None:
    expected = (1 + i % 13) / (0.9 - 0.05 * (i % 9))
    # The tolerances, over the least `1 - w`.
    assert np.all(np.abs(np.asarray(value) - expected) < 1e-5 * (1 + expected))


_PICARD = eqlx.FixedPointIteration(1e-6, 1e-6)


def _with_fixed_tolerances(fn):
    def solve(i):
        y0, w, x = _inputs(i)
        solver = eqlx.FixedPointIteration(1e-6, 1e-6)
        _check(eqlx.fixed_point(fn, solver, y0, (w, x)).value, i)

    return solve


def _with_traced_tolerances(fn):
    def solve(i):
        y0, w, x = _inputs(i)
        tol = jnp.asarray(10.0 ** (-6 - i % 3))
        solver = eqlx.Anderson(tol, tol)
        _check(eqlx.fixed_point(fn, solver, y0, (w, x), throw=False).value, i)

    return solve


def _in_jit(fn):
    jitted = jax.jit(lambda y0, args: eqlx.fixed_point(fn, _PICARD, y0, args).value)

    def solve(i):
        y0, w, x = _inputs(i)
        _check(jitted(y0, (w, x)), i)

    return solve


def _in_vmap(fn):
    @jax.jit
    def jitted(y0, args):
        of = lambda y, a: eqlx.fixed_point(fn, _PICARD, y, a).value
        return jax.vmap(of)(y0, args)

    def solve(i):
        y0, w, x = _inputs(i)
        _check(jitted(y0, (w, x)), i)

    return solve


def _that_throws(fn):
    """All fail, and each raises."""

    def solve(i):
        y0, w, x = _inputs(i)
        with pytest.raises(eqx.EquinoxRuntimeError, match="max_steps_reached"):
            eqlx.fixed_point(fn, _PICARD, y0, (w, 100 + x), max_steps=2)

    return solve


def _from_the_last_state(fn):
    """Each solve goes on from the one before, and hands its state to the next."""
    solver = eqlx.Broyden(1e-6, 1e-6, history_length=3)
    y0, w, x = _inputs(0)
    last = eqlx.fixed_point(_affine, solver, y0, (w, x))

    def solve(i):
        nonlocal last
        y0, w, x = _inputs(i)
        last = eqlx.fixed_point(fn, solver, last.value, (w, x), state=last.state)
        _check(last.value, i)

    return solve


def _adjoint(fn):
    def solve(i):
        _, w, x = _inputs(i)
        solution = x / (1 - w)
        sol = eqlx.solve_adjoint(fn, _PICARD, solution, x, (w, x))
        _check(sol.value, i)  # Of `(1 - w) u == x`.

    return solve


def _gradient(fn):
    def loss(x, monitor, y0, w):
        sol = eqlx.fixed_point(fn, _PICARD, y0, (w, x), monitor=monitor)
        return jnp.sum(sol.value)

    grad = jax.jit(jax.grad(loss, (0, 1)))

    def solve(i):
        y0, w, x = _inputs(i)
        ct_x, seen = grad(x, eqlx.AdjointMonitor(), y0, w)
        _check(ct_x * x, i)
        assert seen.num_solves == 1
        assert seen.num_failed == 0

    return solve


class _Cell(eqx.Module):
    weight: jax.Array
    fn: Callable

    def init(self, x):
        return jnp.zeros_like(x)

    def __call__(self, z, x):
        return self.fn(z, (self.weight, x))


def _layer(fn):
    """A new module each time, of new arrays, as an optimiser makes them."""

    def solve(i):
        _, w, x = _inputs(i)
        layer = eqlx.nn.FixedPointLayer(_Cell(w, fn), _PICARD)
        _check(layer(x), i)

    return solve


_SLOW = (_that_throws,)
_EVERY = (
    *(_with_fixed_tolerances, _with_traced_tolerances, _in_jit, _in_vmap),
    *(_from_the_last_state, _adjoint, _gradient, _layer, *_SLOW),
)


class _Held:
    """What the process holds, after a collection of what it need not."""

    def __init__(self):
        gc.collect()
        self.num_arrays = len(jax.live_arrays())
        self.num_blocks = (
            sys.getallocatedblocks()
        )  # Of memory, all objects of Python's.
        self.num_bytes = 0
        if _STATM.exists():
            pages = int(_STATM.read_text().split()[1])
            self.num_bytes = pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def compilations():
    """The names of what is compiled."""
    seen = []

    def listen(event: str, duration_secs: float, **kwargs):
        del duration_secs
        if event.endswith("backend_compile_duration"):
            seen.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def _assert_no_growth(before: _Held, num_calls: int) -> None:
    after = _Held()
    assert after.num_arrays == before.num_arrays
    # Caches of constant size, of Python itself and others, are filled now and then, and
    # what other threads hold is let go of later: some hundred blocks.
    assert after.num_blocks - before.num_blocks < num_calls / 2
    assert after.num_bytes - before.num_bytes < _BOUND


@pytest.mark.slow
@pytest.mark.parametrize("make", _EVERY, ids=lambda f: f.__name__.strip("_"))
def test_solves_in_a_loop_leave_nothing_behind(make, compilations):
    counted = Counted(_affine)
    solve = make(counted)
    factor = 5 if make in _SLOW else 1
    for i in range(_NUM_WARM_UP // factor):
        solve(i)
    assert counted.traces
    assert compilations
    num_traces, before = len(counted.traces), _Held()
    compilations.clear()
    num_solves = _NUM_SOLVES // factor
    for i in range(num_solves):
        solve(i)
    assert compilations == []
    assert len(counted.traces) == num_traces == 1
    _assert_no_growth(before, num_solves)


_BATCH = 16


class _Neurons(eqx.Module):
    weight: jax.Array
    injection: jax.Array
    fn: Callable = jnp.tanh

    def init(self, x):
        del x
        return jnp.zeros(_SIZE)

    def __call__(self, z, x):
        return self.fn(self.weight @ z + self.injection @ x)


def _predict(params, xs, fn=jnp.tanh):
    layer = eqlx.nn.FixedPointLayer(_Neurons(*params, fn=fn), _PICARD)
    return jax.vmap(layer)(xs)


@pytest.mark.slow
def test_a_thousand_steps_of_training_leave_nothing_behind(compilations, getkey):
    """A layer learns what another one does. Its parameters are donated."""
    counted = Counted(jnp.tanh)
    make = lambda: (0.2 * jr.normal(getkey(), (_SIZE, _SIZE)), jnp.eye(_SIZE))
    teacher, params = make(), make()

    def loss(params, xs, ys):
        return jnp.mean((_predict(params, xs, counted) - ys) ** 2)

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, momentum, xs, ys):
        value, grads = jax.value_and_grad(loss)(params, xs, ys)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)
        return params, momentum, value

    answer = jax.jit(_predict)
    draw = jax.jit(lambda i: jr.normal(jr.key(i), (_BATCH, _SIZE)))
    momentum = jax.tree.map(jnp.zeros_like, params)
    losses, before = np.zeros(1_100), _Held()
    for i in range(1_100):
        if i == 100:
            before = _Held()
            compilations.clear()
        xs, old = draw(i), params
        params, momentum, value = step(params, momentum, xs, answer(teacher, xs))
        assert all(p.is_deleted() for p in old)
        losses[i] = value
    assert compilations == []
    assert len(counted.traces) == 1
    assert losses[-1] < 1e-2 * losses[0]
    _assert_no_growth(before, 1_000)
