"""The contenders that are other libraries' code, and all of them together."""

import functools as ft
import importlib
import importlib.metadata
import importlib.util
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx

from .contender import Contender
from .ours import by_hand, ours


def _both(library: str, name: str, make, **flags) -> list[Contender]:
    """Sample by sample, and the whole batch as one problem."""
    kinds = (False, True)
    return [Contender(library, name, make, is_whole=k, **flags) for k in kinds]


def _optimistix_run(optx: Any, linear, fn, forward, backward, max_steps):
    adjoint = optx.ImplicitAdjoint(linear(backward))

    def run(z0, args):
        return optx.fixed_point(
            fn,
            optx.FixedPointIteration(forward, forward),
            z0,
            args,
            max_steps=max_steps,
            adjoint=adjoint,
            throw=False,
        ).value

    return run


def _optimistix(optx: Any) -> list[Contender]:
    dense = lambda _: optx.ImplicitAdjoint().linear_solver
    gmres = lambda tolerance: lx.GMRES(tolerance, tolerance, max_steps=2000)
    make = ft.partial(_optimistix_run, optx, gmres)
    by_default = Contender(
        "Optimistix", "default", ft.partial(_optimistix_run, optx, dense), is_tied=True
    )
    return [by_default, *_both("Optimistix", "GMRES", make)]


def _jaxopt_run(method, linear, fn, forward, backward, max_steps):
    def run(z0, args):
        solver = method(
            fn,
            maxiter=max_steps,
            tol=forward,
            implicit_diff_solve=ft.partial(linear, tol=backward),
        )
        return solver.run(z0, args).params

    return run


def _jaxopt(jaxopt: Any) -> list[Contender]:
    linear = jaxopt.linear_solve
    plain = ft.partial(_jaxopt_run, jaxopt.FixedPointIteration, linear.solve_gmres)
    mixed = ft.partial(_jaxopt_run, jaxopt.AndersonAcceleration, linear.solve_gmres)
    default = ft.partial(
        _jaxopt_run, jaxopt.FixedPointIteration, linear.solve_normal_cg
    )
    return [
        *_both("JAXopt", "iteration, GMRES", plain),
        *_both("JAXopt", "iteration, normal CG", default),
        *_both("JAXopt", "Anderson, GMRES", mixed),
    ]


def _banax_run(banax: Any, method, fn, forward, backward, max_steps):
    make = lambda rtol: method(rtol=rtol, max_steps=max_steps)
    adjoint = banax.adjoint.Implicit(make(forward), make(backward))
    return lambda z0, args: adjoint((fn, (args,)), z0).value


def _banax(banax: Any) -> list[Contender]:
    plain = ft.partial(_banax_run, banax, banax.solver.Picard)
    mixed = ft.partial(_banax_run, banax, banax.solver.Anderson)
    return [
        *_both("banax", "Picard", plain, is_static=True),
        *_both("banax", "Anderson", mixed, is_static=True),
    ]


class _Fn(eqx.Module):
    """What anchorax injects is of the shape of the state; here that is ignored.

    The arrays are in a tuple, for what is left without them has to be hashable.
    """

    fn: object = eqx.field(static=True)
    structure: object = eqx.field(static=True)
    arrays: tuple

    def __call__(self, u, _, *, inference, key):
        del inference, key
        args = jax.tree.unflatten(self.structure, self.arrays)
        return self.fn(u, args)  # pyright: ignore


def _anchorax_run(method, fn, forward, backward, max_steps):
    del backward

    def run(z0, args):
        arrays, structure = jax.tree.flatten(args)
        layer = _Fn(fn, structure, tuple(arrays))
        params, static = eqx.partition(layer, eqx.is_array)
        return method(
            params,
            static,
            jax.tree.map(jnp.zeros_like, z0),
            eps=forward,
            max_depth=max_steps,
            stop_mode="rel",
            key=jr.key(0),
        )[0]

    return run


def _anchorax(solvers: Any) -> list[Contender]:
    make = lambda method: ft.partial(_anchorax_run, method)
    reason = "its gradients are one-step or Broyden's estimate, of no accuracy"
    flags = {"is_static": True, "is_tied": True, "reason": reason}
    return [
        *_both("anchorax", "Picard", make(solvers.picard), **flags),
        *_both("anchorax", "Anderson", make(solvers.anderson), **flags),
    ]


_LIBRARIES = {
    "optimistix": _optimistix,
    "jaxopt": _jaxopt,
    "banax": _banax,
    "anchorax.solvers": _anchorax,
}


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def versions() -> dict[str, str]:
    """Of the libraries that are installed; an empty one of those that are not."""
    found = {"jax": jax.__version__}
    for name in (n.split(".")[0] for n in _LIBRARIES):
        found[name] = importlib.metadata.version(name) if _is_there(name) else ""
    return found


def all_contenders() -> list[Contender]:
    """Ours first, then by hand, then those of the libraries that are installed."""
    found = ours() + by_hand()
    for name, make in _LIBRARIES.items():
        if _is_there(name):
            found += make(importlib.import_module(name))
    return found
