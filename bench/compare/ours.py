"""Our layers, and what people write without a library.

Each makes, from a function and two tolerances, `run(z0, args) -> z`, whose gradient it
defines.
"""

import functools as ft

import equilax as eqlx
import jax
import jax.numpy as jnp
from jax import lax

from .contender import Contender, Make


# That of the sample, or of the batch, as the others measure. The largest element takes
# one pass, where the Euclidean norm, which scales before it squares, takes several.
_NORM = eqlx.RelativeToNorm()


def by_equilax(solver, adjoint=None, **options) -> Make:
    def make(fn, forward, backward, max_steps):
        linear = eqlx.ImplicitAdjoint() if adjoint is None else adjoint(backward)

        def run(z0, args):
            return eqlx.fixed_point(
                fn,
                solver(forward, 0.0, norm=_NORM),
                z0,
                args,
                max_steps=max_steps,
                adjoint=linear,
                throw=False,
                **options,
            ).value

        return run

    return make


def _own(solver):
    """An adjoint by `solver` too, with a tolerance of its own."""

    def adjoint(backward):
        linear = solver(backward, 0.0, norm=_NORM)
        return eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(linear, max_steps=4000))

    return adjoint


def ours() -> list[Contender]:
    add = ft.partial(Contender, "equilax")
    both = lambda solver: by_equilax(solver, _own(solver))
    iteration = both(eqlx.FixedPointIteration)
    return [
        add("Anderson", by_equilax(eqlx.Anderson), is_tied=True),
        add("alternating", by_equilax(eqlx.AlternatingAnderson), is_tied=True),
        add("Anderson, own tolerance", both(eqlx.Anderson)),
        add("alternating, own tolerance", both(eqlx.AlternatingAnderson)),
        add("iteration, own tolerance", iteration),
        add("iteration, own tolerance", iteration, is_whole=True),
        add("Broyden, own tolerance", both(eqlx.Broyden)),
    ]


def _norm(tree):
    leaves = [jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(ft.reduce(lambda a, b: a + b.astype(a.dtype), leaves))


def _two_loops(fn, forward, backward, max_steps):
    """What people write: two loops and a `custom_vjp`, as in the notebook."""

    def iterate(step, z0, tolerance):
        def cond(carry):
            count, last, z = carry
            moved = _norm(jax.tree.map(jnp.subtract, z, last))
            return (count < max_steps) & (moved > tolerance * _norm(z))

        body = lambda carry: (carry[0] + 1, carry[2], step(carry[2]))
        return lax.while_loop(cond, body, (1, z0, step(z0)))[2]

    @jax.custom_vjp
    def run(z0, args):
        return iterate(lambda z: fn(z, args), z0, forward)

    def fwd(z0, args):
        z = run(z0, args)
        return z, (z0, args, z)

    def bwd(res, ct):
        z0, args, z = res
        _, in_z = jax.vjp(lambda z: fn(z, args), z)
        zeros = jax.tree.map(jnp.zeros_like, z0)
        step = lambda u: jax.tree.map(jnp.add, in_z(u)[0], ct)
        u = iterate(step, zeros, backward)
        _, in_args = jax.vjp(lambda args: fn(z, args), args)
        return zeros, in_args(u)[0]

    run.defvjp(fwd, bwd)
    return run


def _unrolled(fn, forward, backward, max_steps):
    del forward, backward, max_steps

    def run(z0, args):
        return lax.scan(lambda z, _: (fn(z, args), None), z0, length=30)[0]

    return run


def by_hand() -> list[Contender]:
    return [
        Contender("by hand", "two loops", _two_loops),
        Contender("by hand", "two loops", _two_loops, is_whole=True),
        Contender("unrolled", "30 layers", _unrolled, is_static=True, is_tied=True),
    ]
