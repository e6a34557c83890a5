"""The same layer in other libraries and in ours, by its tolerances."""

import dataclasses
import functools as ft
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import equilax as eqlx
import jax
import jax.numpy as jnp
import lineax as lx

from .gradient_cell import cell


MAX_STEPS = 500
OURS = "equilax, Anderson"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A layer of some library.

    **Attributes:**

    - `layer`: From tolerances, forward and backward, to a `fn(z0, w, x)`.
    - `is_batch`: Whether the whole batch is one problem to it, not each sample.
    - `is_static`: Whether it must know its tolerances when it is compiled.
    - `is_tied`: Whether it has no tolerance of its own backwards.
    """

    layer: Callable[[Any, Any], Callable]
    is_batch: bool = False
    is_static: bool = False
    is_tied: bool = False

    def solve(self, forward, backward) -> Callable:
        layer = self.layer(forward, backward)
        if not self.is_batch:
            layer = jax.vmap(layer, (0, None, 0))
        return lambda w, xs: layer(jnp.zeros_like(xs), w, xs)


def _whole(zs, args):
    w, xs = args
    return jnp.tanh(zs @ w.T + xs)


def _ours(solver, adjoint=None, **options) -> Callable:
    def layer(forward, backward):
        linear = eqlx.ImplicitAdjoint() if adjoint is None else adjoint(backward)
        fn = _whole if options else cell

        def run(z0, w, x):
            return eqlx.fixed_point(
                fn,
                solver(0.0, forward),
                z0,
                (w, x),
                max_steps=MAX_STEPS,
                adjoint=linear,
                throw=False,
                **options,
            ).value

        return run

    return layer


def _own_tolerance(backward):
    solver = eqlx.Anderson(0.0, backward)
    return eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(solver))


def _our_peers() -> dict[str, Peer]:
    """The third has a tolerance of its own backwards, as the others' have."""
    return {
        OURS: Peer(_ours(eqlx.Anderson), is_tied=True),
        "equilax, iteration": Peer(_ours(eqlx.FixedPointIteration), is_tied=True),
        "equilax, Anderson, fixed point": Peer(_ours(eqlx.Anderson, _own_tolerance)),
        "equilax, Anderson, batch_axis": Peer(
            _ours(eqlx.Anderson, batch_axis=0), is_batch=True, is_tied=True
        ),
    }


def _optimistix(optx: Any, fn: Callable, linear: Callable) -> Callable:
    def layer(forward, backward):
        def run(z0, w, x):
            return optx.fixed_point(
                fn,
                optx.FixedPointIteration(0.0, forward),
                z0,
                (w, x),
                max_steps=MAX_STEPS,
                adjoint=optx.ImplicitAdjoint(linear(backward)),
                throw=False,
            ).value

        return run

    return layer


def _optimistix_peers(optx: Any) -> dict[str, Peer]:
    """Its default linear solver is dense, and so is left out for the whole batch."""
    gmres = lambda tolerance: lx.GMRES(tolerance, tolerance)
    default = lambda _: optx.ImplicitAdjoint().linear_solver
    return {
        "Optimistix, default": Peer(_optimistix(optx, cell, default), is_tied=True),
        "Optimistix, GMRES": Peer(_optimistix(optx, cell, gmres)),
        "Optimistix, GMRES, whole batch": Peer(
            _optimistix(optx, _whole, gmres), is_batch=True
        ),
    }


def _jaxopt(method: Callable, linear: Callable, fn: Callable) -> Callable:
    def layer(forward, backward):
        def run(z0, w, x):
            solver = method(
                fn,
                maxiter=MAX_STEPS,
                tol=forward,
                implicit_diff_solve=ft.partial(linear, tol=backward),
            )
            return solver.run(z0, (w, x)).params

        return run

    return layer


def _jaxopt_peers(jaxopt: Any) -> dict[str, Peer]:
    linear = jaxopt.linear_solve
    methods = {
        "iteration": jaxopt.FixedPointIteration,
        "Anderson": jaxopt.AndersonAcceleration,
    }
    solvers = {"normal CG": linear.solve_normal_cg, "GMRES": linear.solve_gmres}
    peers = {}
    for name, method in methods.items():
        for kind, solve in solvers.items():
            row = f"JAXopt, {name}, {kind}"
            peers[row] = Peer(_jaxopt(method, solve, cell))
            peers[f"{row}, whole batch"] = Peer(_jaxopt(method, solve, _whole), True)
    return peers


def _banax(banax: Any, method: Callable, fn: Callable) -> Callable:
    def layer(forward, backward):
        make = lambda rtol: method(rtol=rtol, max_steps=MAX_STEPS)
        adjoint = banax.adjoint.Implicit(make(forward), make(backward))
        return lambda z0, w, x: adjoint((fn, ((w, x),)), z0).value

    return layer


def _banax_peers(banax: Any) -> dict[str, Peer]:
    methods = {"Picard": banax.solver.Picard, "Anderson": banax.solver.Anderson}
    peers = {}
    for name, method in methods.items():
        make = ft.partial(_banax, banax, method)
        peers[f"banax, {name}"] = Peer(make(cell), is_static=True)
        peers[f"banax, {name}, whole batch"] = Peer(make(_whole), True, True)
    return peers


_LIBRARIES = {
    "optimistix": _optimistix_peers,
    "jaxopt": _jaxopt_peers,
    "banax": _banax_peers,
}


def all_peers() -> dict[str, Peer]:
    """Ours, and those of the libraries that are installed."""
    peers = _our_peers()
    for name, make in _LIBRARIES.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed")
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "of no known version"
        print(f"{name} {version}")
        peers |= make(importlib.import_module(name))
    return peers
