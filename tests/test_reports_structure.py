"""Trees, modules, states and randomness, of the kinds that `tests/README.md` lists."""

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .helpers import relative_error


_SOLVER = eqlx.FixedPointIteration(0.0, 1e-11)
_LEAN = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(_SOLVER))


def _solve(fn, y0, args, **kwargs):
    return eqlx.fixed_point(
        fn, _SOLVER, y0, args, adjoint=_LEAN, throw=False, max_steps=400, **kwargs
    )


def test_a_network_with_functions_among_its_leaves_gets_a_gradient_of_its_arrays(
    getkey,
):
    network = eqx.nn.MLP(3, 3, 4, 1, activation=jnp.tanh, key=getkey())
    xs = jr.normal(getkey(), (2, 3))

    def fn(z, args):
        network, x = args
        return 0.3 * network(z) + x

    loss = lambda net, x: jnp.sum(_solve(fn, jnp.zeros(3), (net, x)).value)

    def expected(net, x):
        z = jnp.zeros(3)
        for _ in range(40):
            z = fn(z, (net, x))
        dense = jax.jacfwd(fn)(z, (net, x))
        u = jnp.linalg.solve(jnp.eye(3) - dense.T, jnp.ones(3))
        of_net = eqx.filter_vjp(lambda net: fn(z, (net, x)), net)[1](u)[0]
        return of_net

    both = eqx.filter_jit(eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0)))
    grads = both(network, xs)
    assert grads.activation is None
    for k, x in enumerate(xs):
        got = jax.tree.map(lambda g, k=k: g[k], eqx.filter(grads, eqx.is_array))
        want = eqx.filter(expected(network, x), eqx.is_array)
        assert relative_error(got, want) < 1e-8


def test_integers_among_the_arguments_have_no_tangent():
    # z = cos(a z) for a = 1, where dz/da is known.
    def solve(a, args):
        fn = lambda z, p: jnp.where(p["mask"], jnp.cos(p["a"] * z), 0.0) * p["ones"][1]
        return _solve(fn, jnp.array(0.5), {**args, "a": a}).value

    args = {"mask": jnp.array(True), "count": jnp.array(3), "ones": [None, 1.0]}
    none = lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0)
    tangents = {"mask": none(True), "count": none(3), "ones": [None, 0.0]}
    one, slope = jnp.ones(()), -0.2974743
    _, pushed = jax.jvp(solve, (one, args), (one, tangents))
    assert np.isclose(pushed, slope, atol=1e-7)
    back = jax.jit(jax.grad(solve, (0, 1), allow_int=True))(one, args)
    assert np.isclose(back[0], slope, atol=1e-7)
    assert back[1]["mask"].dtype == back[1]["count"].dtype == jax.dtypes.float0
    assert jax.tree.structure(back[1]) == jax.tree.structure(args)


def test_leaves_and_batches_without_elements_have_gradients_without_elements():
    def fn(z, c):
        return {"some": 0.5 * z["some"] + c["some"], "none": z["none"] + c["none"]}

    def loss(c):
        start = {"some": jnp.zeros(2), "none": jnp.zeros((0, 3))}
        sol = _solve(fn, start, c)
        return jnp.sum(sol.value["some"]) + jnp.sum(sol.value["none"]), sol

    c = {"some": jnp.ones(2), "none": jnp.ones((0, 3))}
    (_, sol), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(c)
    assert sol.result == eqlx.RESULTS.successful
    assert np.allclose(sol.value["some"], 2)
    assert np.allclose(grad["some"], 2)
    assert sol.value["none"].shape == grad["none"].shape == (0, 3)
    batch = jax.vmap(jax.grad(lambda c: loss(c)[0]))
    empty = jax.jit(batch)({"some": jnp.ones((0, 2)), "none": jnp.ones((0, 0, 3))})
    assert empty["some"].shape == (0, 2)
    alone = jax.grad(lambda c: jnp.sum(_solve(lambda z, c: c * z, c, c).value))
    assert alone(jnp.zeros(0)).shape == (0,)


class _RunningMean(eqx.Module):
    """Subtracts a mean that it has seen, and sees another value each time."""

    index: eqx.nn.StateIndex

    def __init__(self):
        self.index = eqx.nn.StateIndex(jnp.zeros(()))

    def __call__(self, z, state):
        mean = state.get(self.index)
        return z - mean, state.set(self.index, 0.9 * mean + 0.1 * jnp.mean(z))


def test_a_running_statistic_is_updated_once_at_the_solution():
    layer, state = eqx.nn.make_with_state(_RunningMean)()
    state = state.set(layer.index, jnp.array(0.2, jnp.float64))

    def solve(c, state, atol):
        # The state goes into every step as it was, and comes out as `aux`.
        def fn(z, args):
            c, state = args
            centred, new_state = layer(z, state)
            return 0.5 * centred + c, new_state

        solver = eqlx.FixedPointIteration(0.0, atol)
        start, args = jnp.zeros(3), (c, state)
        sol = eqlx.fixed_point(fn, solver, start, args, has_aux=True, adjoint=_LEAN)
        return sol.value, sol.aux

    c = jnp.array([1.0, 2.0, 4.5])
    for atol in (1e-4, 1e-11):
        value, new = eqx.filter_jit(solve)(c, state, atol)
        # z = (c - 0.1) / 0.5, whatever the number of steps.
        assert np.allclose(value, 2 * (c - 0.1), atol=2 * atol)
        expected = 0.9 * 0.2 + 0.1 * np.mean(2 * (c - 0.1))
        assert np.isclose(new.get(layer.index), expected, atol=atol)
    loss = lambda c: jnp.sum(solve(c, state, 1e-11)[0])
    assert np.allclose(jax.grad(loss)(c), 2)


def test_batch_statistics_are_frozen_in_the_solve_and_seen_once_after_it(getkey):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        3, axis_name="batch", mode="ema", momentum=0.9
    )
    frozen = eqx.nn.inference_mode(norm)
    xs = jr.normal(getkey(), (5, 3))
    step = lambda norm, z, x, state: norm(jnp.tanh(0.5 * z + x), state)

    def layer(x, state):
        fn = lambda z, args: 0.5 * step(frozen, z, *args)[0]
        z = _solve(fn, jnp.zeros(3), (x, state)).value
        return z, step(norm, z, x, state)[1]

    once = jax.vmap(
        lambda x, s: step(norm, 0 * x, x, s)[1], (0, None), None, axis_name="batch"
    )
    state = once(xs, state)
    run = jax.vmap(layer, (0, None), (0, None), axis_name="batch")
    zs, new = eqx.filter_jit(run)(xs, state)
    mean, var = (np.asarray(v) for v in state.get(norm.ema_state_index))
    weight, bias = np.asarray(norm.weight), np.asarray(norm.bias)
    image = np.tanh(0.5 * np.asarray(zs) + np.asarray(xs))
    scaled = (image - mean) / np.sqrt(var + norm.eps) * weight + bias
    assert np.max(np.abs(0.5 * scaled - zs)) < 1e-9
    seen = 0.9 * mean + 0.1 * image.mean(0)
    assert np.allclose(new.get(norm.ema_state_index)[0], seen, atol=1e-9)


def test_a_mask_is_the_same_in_every_step_and_another_for_another_key(getkey):
    drop, (key, other) = eqx.nn.Dropout(0.5), jr.split(getkey())
    c = jr.normal(getkey(), (64,))
    fn = lambda z, key: drop(0.3 * jnp.tanh(z) + c, key=key)
    solve = jax.jit(jax.vmap(lambda key: _solve(fn, jnp.zeros(64), key)))
    sols = solve(jnp.stack([key, key, other]))
    assert jnp.all(sols.result == eqlx.RESULTS.successful)
    assert np.array_equal(sols.value[0], sols.value[1])
    assert not np.array_equal(sols.value[0] == 0, sols.value[2] == 0)
    assert np.max(np.abs(fn(sols.value[2], other) - sols.value[2])) < 1e-10
