from collections.abc import Callable

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np


def every_solver(rtol, atol):
    """One of each solver; a new one joins here, and so runs against everything."""
    return solver_list(rtol, atol) | {
        "newton": eqlx.Newton(rtol, atol),
        "newton_krylov": eqlx.NewtonKrylov(rtol, atol, restart=6),
        "auto": eqlx.Auto(rtol, atol, history_length=3, restart=6),
    }


def solver_list(rtol, atol):
    """Those that evaluate `fn` once a step, and nothing else of it."""
    return {
        "picard": eqlx.FixedPointIteration(rtol, atol),
        "damped": eqlx.FixedPointIteration(rtol, atol, damp=0.3),
        "anderson": eqlx.Anderson(rtol, atol),
        "anderson_damped": eqlx.Anderson(rtol, atol, history_length=3, damp=0.2),
        "alternating": eqlx.AlternatingAnderson(rtol, atol),
        "type_i": eqlx.AndersonTypeI(rtol, atol),
        "broyden": eqlx.Broyden(rtol, atol),
        "bad_broyden": eqlx.BadBroyden(rtol, atol),
        "reversible": eqlx.Reversible(rtol, atol),
        "best_so_far": eqlx.BestSoFar(eqlx.Anderson(rtol, atol)),
        "traced": eqlx.Traced(eqlx.FixedPointIteration(rtol, atol)),
    }


def each_with_one(names, others, thorough=("picard", "anderson", "auto")):
    """Pairs: every name with the first of `others`, some names with all of them."""
    return [(n, o) for n in names for o in (others if n in thorough else others[:1])]


def tanh_cell(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


def tanh_problem(key, size, gain, dtype=jnp.float64):
    """A cell of spectral norm `gain`, and an input of order one."""
    w_key, x_key = jr.split(key)
    w = jr.normal(w_key, (size, size), jnp.float64)
    w = gain * w / jnp.linalg.norm(w, ord=2)
    x = jr.normal(x_key, (size,), jnp.float64)
    return w.astype(dtype), x.astype(dtype)


def newton(fn, z, args, num_steps=60):
    """The fixed point in float64, by dense Newton steps: nothing of ours is in it."""
    z, args = to_float64((z, args))
    size = z.size
    for _ in range(num_steps):
        jacobian = np.asarray(jax.jacfwd(fn)(z, args)).reshape(size, size)
        residual = np.asarray(fn(z, args) - z).reshape(size)
        step = np.linalg.solve(np.eye(size) - jacobian, residual)
        z = z + step.reshape(z.shape)
        if np.max(np.abs(step)) < 1e-15 * (1 + np.max(np.abs(z))):
            break
    return z


def dense_sensitivity(fn, z, args):
    """`dz/dargs` at a fixed point, leaf by leaf, by a dense inverse in float64."""
    z, args = to_float64((z, args))
    size = z.size
    jacobian = np.asarray(jax.jacfwd(fn)(z, args)).reshape(size, size)
    inverse = np.linalg.inv(np.eye(size) - jacobian)

    def of_leaf(d):
        out = inverse @ np.asarray(d).reshape(size, -1)
        return jnp.asarray(out.reshape(d.shape))

    return jax.tree.map(of_leaf, jax.jacfwd(fn, argnums=1)(z, args))


def batch_reference(w, xs):
    """Fixed points of `tanh_cell` for a batch of inputs, and what their sum depends on.

    **Returns:**

    The fixed points, and the gradients of the sum of all in `w` and in `xs`.
    """
    size = w.shape[0]
    zs = [newton(tanh_cell, jnp.zeros(size), (w, x)) for x in xs]
    parts = [
        dense_sensitivity(tanh_cell, z, (w, x)) for z, x in zip(zs, xs, strict=True)
    ]
    grad_w = sum(part[0].sum(0) for part in parts)
    return np.stack(zs), grad_w, np.stack([part[1].sum(0) for part in parts])


def to_float64(tree):
    def convert(x):
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        return x.astype(jnp.complex128 if is_complex else jnp.float64)

    return jax.tree.map(convert, tree)


def relative_error(got, expected):
    """The largest difference over all leaves, relative to the largest number."""
    got, expected = to_float64((got, expected))
    difference = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), got, expected)
    size = jax.tree.map(lambda a: jnp.max(jnp.abs(a)), expected)
    return float(max(jax.tree.leaves(difference)) / max(jax.tree.leaves(size)))


class Counted(eqx.Module):
    """Counts in `traces` how often Python runs `fn`."""

    fn: Callable
    traces: list = eqx.field(static=True, default_factory=list)

    def __call__(self, *args):
        self.traces.append(None)
        return self.fn(*args)


def is_successful(sol):
    return sol.result == eqlx.RESULTS.successful


def optimised_hlo(fn, *args) -> str:
    """The program that runs, as text."""
    return str(jax.jit(fn).lower(*args).compile().as_text())
