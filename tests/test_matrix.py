"""Every adjoint with every solver, under every transform, in every surrounding.

A part of the combinations runs by default. `pytest -m matrix` runs all of them.
"""

import functools as ft

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from .helpers import every_solver, relative_error


# More unknowns than a history holds: the derivative of a step whose small system has
# lost its rank is one of rounding errors.
_SIZE, _NUM = 6, 2
_PRECISIONS = {
    "float64": (jnp.float64, 1e-12, 1e-10),
    "float32": (jnp.float32, 1e-6, 2e-5),
}
_W = np.random.default_rng(1).normal(size=(_SIZE, _SIZE))
_W = 0.6 * _W / np.linalg.norm(_W, 2)
_FIRST = ("grad", "jvp", "vjp", "jacfwd", "jacrev")
_SECOND = ("forward over reverse", "reverse over reverse")
_NOT_IN_SHARD_MAP = ("lu", "qr", "gmres")
_SURROUNDINGS = ("plain", "jit", "vmap", "shard_map")


def _cell(z, args):
    gain, x = args
    return jnp.tanh(gain * (jnp.asarray(_W, z.dtype) @ z) + x)


def _exact(tol):
    """Adjoints whose derivative is that of the solution."""
    implicit = eqlx.ImplicitAdjoint
    near_inverse = lambda v, y, args: v + args[0] * (jnp.asarray(_W, v.dtype) @ v)
    return {
        "default": implicit(),
        "fixed_point": implicit(
            eqlx.FixedPointLinearSolver(eqlx.FixedPointIteration(0.0, tol))
        ),
        "krylov": implicit(eqlx.KrylovLinearSolver(tol)),
        "preconditioned": implicit(eqlx.KrylovLinearSolver(tol), near_inverse),
        "lu": implicit(lx.LU()),
        "qr": implicit(lx.QR()),
        "gmres": implicit(lx.GMRES(tol, tol)),
        "shared_inverse": eqlx.SharedInverseAdjoint(eqlx.KrylovLinearSolver(tol)),
        "checkpoint": eqlx.RecursiveCheckpointAdjoint(),
    }


def _truncated():
    """Truncations: the number of terms and the damping of each."""
    return {"one_step": (0, 0.0), "neumann": (3, 0.0), "phantom": (2, 0.5)}


def _adjoint(name, tol):
    if name in _truncated():
        return eqlx.ImplicitAdjoint(eqlx.Neumann(*_truncated()[name]))
    return _exact(tol)[name]


def _inputs(dtype):
    """One problem more than there are samples: the lone one."""
    gains = jnp.linspace(0.5, 1.0, _NUM, dtype=dtype)
    xs = jr.normal(jr.key(3), (_NUM, _SIZE), jnp.float64).astype(dtype)
    return gains, xs


@ft.cache
def _reference(k):
    """The first and second derivative of problem `k`, by 200 unrolled steps."""
    gains, xs = _inputs(jnp.float64)
    x64 = lambda x: jnp.asarray(x, jnp.float64)

    def unrolled(args):
        step = lambda z, _: (_cell(z, args), None)
        return jax.lax.scan(step, jnp.zeros(_SIZE), None, length=200)[0]

    args = (x64(gains[k]), x64(xs[k]))
    return jax.jacfwd(unrolled)(args), jax.hessian(lambda a: _loss(unrolled(a)))(args)


_weights = np.array([1.0, -2.0, 0.5, 0.3, -0.7, 1.2])


def _loss(z):
    return jnp.sum(jnp.asarray(_weights, z.dtype) * z)


def _tangent(args):
    return jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), args
    )


def _pull_back(solve, args):
    z, pull = jax.vjp(solve, args)
    return pull(jnp.zeros_like(z) + jnp.asarray(_weights, z.dtype))[0]


def _derivatives(solve, names):
    """A function of one problem, of all the derivatives that are named."""
    loss = lambda args: _loss(solve(args))
    ways = {
        "grad": jax.grad(loss),
        "jvp": lambda args: jax.jvp(solve, (args,), (_tangent(args),))[1],
        "vjp": ft.partial(_pull_back, solve),
        "jacfwd": jax.jacfwd(solve),
        "jacrev": jax.jacrev(solve),
        "forward over reverse": jax.jacfwd(jax.grad(loss)),
        "reverse over reverse": jax.jacrev(jax.grad(loss)),
    }
    return lambda args: {name: ways[name](args) for name in names}


def _shortened(k, first, num_terms, damp):
    """The partial sum of the series in place of `(I - J)^-1`."""
    gains, xs = _inputs(jnp.float64)
    args, z = (gains[k], xs[k]), jnp.zeros(_SIZE)
    for _ in range(200):
        z = _cell(z, args)
    jacobian = np.asarray(jax.jacfwd(_cell)(z, args))
    term = damp * np.eye(_SIZE) + (1 - damp) * jacobian
    powers = [np.linalg.matrix_power(term, j) for j in range(num_terms + 1)]
    series = (1 - damp) * sum(powers) @ (np.eye(_SIZE) - jacobian)
    return jax.tree.map(lambda d: jnp.tensordot(series, d, 1), first)


def _expected(k, names, adjoint):
    first, second = _reference(k)
    if adjoint in _truncated():
        first = _shortened(k, first, *_truncated()[adjoint])
    weighted = jax.tree.map(lambda d: jnp.tensordot(_weights, d, 1), first)
    tangent = _tangent(jax.tree.map(lambda d: d[0], first))
    along = jax.tree.map(lambda d, t: jnp.tensordot(d, t, t.ndim), first, tangent)
    out = dict.fromkeys(("grad", "vjp"), weighted) | {"jvp": along[0] + along[1]}
    out |= dict.fromkeys(("jacfwd", "jacrev"), first) | dict.fromkeys(_SECOND, second)
    return {name: out[name] for name in names}


def _run(surrounding, fn, dtype):
    """`fn` on all the problems, or on the first of them alone."""
    args = _inputs(dtype)
    first = jax.tree.map(lambda x: x[0], args)
    if surrounding == "plain":
        return [fn(first)]
    if surrounding == "jit":
        return [jax.jit(fn)(first)]
    run = jax.vmap(fn)
    if surrounding == "shard_map":
        mesh = jax.make_mesh((_NUM,), ("b",), axis_types=(AxisType.Explicit,))
        args = jax.device_put(args, jax.NamedSharding(mesh, P("b")))
        run = jax.shard_map(run, mesh=mesh, in_specs=(P("b"),), out_specs=P("b"))
    out = jax.jit(run)(args)
    return [jax.tree.map(lambda x, k=k: np.asarray(x)[k], out) for k in range(_NUM)]


def _names(adjoint, solver):
    """What is defined for a pair, or nothing where they do not go together."""
    if adjoint == "shared_inverse" and "broyden" not in solver:
        return ()
    if adjoint in _truncated():
        return _FIRST
    if adjoint != "checkpoint":
        return _FIRST + _SECOND
    return (
        ()
        if solver in ("newton", "newton_krylov", "auto")
        else ("grad", "vjp", "jacrev")
    )


def _check(adjoint, solver, surrounding, precision, only=_FIRST + _SECOND):
    dtype, tol, bound = _PRECISIONS[precision]
    names = tuple(name for name in _names(adjoint, solver) if name in only)
    is_refused = surrounding == "shard_map" and adjoint in _NOT_IN_SHARD_MAP
    if not names or is_refused:
        pytest.skip("Refused, with an error that says so.")

    def solve(args):
        return eqlx.fixed_point(
            _cell,
            every_solver(0.0, tol)[solver],
            jnp.zeros_like(args[1]),
            args,
            adjoint=_adjoint(adjoint, tol),
            throw=False,
        ).value

    found = _run(surrounding, _derivatives(solve, names), dtype)
    for k, got in enumerate(found):
        expected = _expected(k, names, adjoint)
        for name in names:
            error = relative_error(got[name], expected[name])
            assert error < bound, (name, k, error)
    assert len(found) == (1 if surrounding in ("plain", "jit") else _NUM)


_ADJOINTS = [*_exact(1e-3), *_truncated()]
_SOLVERS = list(every_solver(0.0, 1e-3))


_PART = {
    "default": ("vmap",),
    "krylov": ("shard_map",),
    "lu": ("vmap",),
    "gmres": ("jit",),
    "shared_inverse": ("jit",),
    "checkpoint": ("vmap",),
    "one_step": ("shard_map",),
    "neumann": ("vmap",),
    "phantom": ("plain",),
}


@pytest.mark.parametrize(
    ("adjoint", "surrounding"), [(a, s) for a, of_a in _PART.items() for s in of_a]
)
def test_derivatives(adjoint, surrounding):
    _check(adjoint, "broyden", surrounding, "float64")


@pytest.mark.parametrize("solver", _SOLVERS)
def test_the_solver_does_not_matter(solver):
    _check("fixed_point", solver, "jit", "float64", only=("grad", "jvp"))


def test_derivatives_in_single_precision():
    _check("fixed_point", "anderson", "jit", "float32", only=("grad", "jvp"))


@pytest.mark.matrix
@pytest.mark.parametrize("precision", list(_PRECISIONS))
@pytest.mark.parametrize("surrounding", _SURROUNDINGS)
@pytest.mark.parametrize("solver", _SOLVERS)
@pytest.mark.parametrize("adjoint", _ADJOINTS)
def test_derivatives_of_every_pair(adjoint, solver, surrounding, precision):
    _check(adjoint, solver, surrounding, precision)
