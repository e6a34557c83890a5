"""Monotone layers, their solutions by both splittings, and by NumPy."""

from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np


TOLERANCE, MAX_STEPS = 1e-10, 400_000


def random_layers(size: int, margin: float, num: int) -> eqlx.nn.MonotoneLinear:
    """One for each of the seeds from 0, as a single module with a leading axis."""
    make = lambda key: eqlx.nn.MonotoneLinear(size, margin, key=key)
    return jax.vmap(make)(jax.vmap(jr.key)(jnp.arange(num)))


def sharp_layer(size: int, margin: float) -> eqlx.nn.MonotoneLinear:
    r"""One for which the bound on `alpha` is exact.

    With `A = 0` and `B` a matrix of rotations by a right angle, `I - W = m I + B^T - B`
    is normal, and each of its eigenvalues is `m + i s` or `m - i s`: of the real part
    `m` and the magnitude `L`. Where all units are active the step is linear, with the
    eigenvalues `1 - alpha (m + i s)`, and `|1 - alpha (m + i s)|^2 = 1 - 2 alpha m +
    alpha^2 L^2`, which is one for `alpha = 2 m / L^2`.
    """
    linear = eqlx.nn.MonotoneLinear(size, margin, key=jr.key(0))
    turn = jnp.kron(jnp.eye(size // 2), jnp.array([[0.0, 1.0], [0.0, 0.0]]))
    return eqx.tree_at(lambda x: (x.a, x.b), linear, (0 * linear.a, turn))


def injections(size: int, num: int) -> jax.Array:
    keys = jax.vmap(lambda seed: jr.fold_in(jr.key(seed), 1))(jnp.arange(num))
    return jax.vmap(lambda key: jr.normal(key, (size,)))(keys)


def all_active(linear: eqlx.nn.MonotoneLinear) -> jax.Array:
    """The injection for which the equilibrium is one everywhere."""
    ones = jnp.ones(linear.features)
    return ones - linear(ones)


def _layer(linear, splitting, max_steps):
    solver = eqlx.FixedPointIteration(0.0, TOLERANCE)
    adjoint = eqlx.FixedPointLinearSolver(solver, max_steps=max_steps)
    return eqlx.nn.MonotoneLayer(
        linear,
        lambda u: u,
        splitting,
        solver,
        adjoint=eqlx.ImplicitAdjoint(adjoint, on_failure=eqlx.OnFailure.keep),
        batching=eqlx.Lockstep(),
        max_steps=max_steps,
    )


class Outcome(eqx.Module):
    """Of each seed.

    **Attributes:**

    - `grads`: Of a linear function of the equilibrium, in `A`, `B` and `u`.
    - `back_steps`: Of the adjoint, and whether it was solved.
    """

    z: Any
    steps: Any
    is_solved: Any
    grads: Any
    back_steps: Any
    is_back_solved: Any


@eqx.filter_jit
def solve(kind: type, linears, us, alphas, max_steps: int = MAX_STEPS) -> Outcome:
    """All seeds, each with an `alpha` of its own.

    **Arguments:**

    - `kind`: The class of the splitting.
    """

    def one(linear, u, alpha):
        monitor = eqlx.AdjointMonitor()

        def value(params):
            linear, u, monitor = params
            layer = _layer(linear, kind(alpha), max_steps)
            sol = layer.solve(u, monitor=monitor)
            weights = jnp.arange(1.0, 1 + u.size) / u.size
            return jnp.sum(weights * sol.value), sol

        grads, sol = eqx.filter_grad(value, has_aux=True)((linear, u, monitor))
        of_linear, of_u, seen = grads
        return Outcome(
            sol.value,
            sol.stats["num_steps"],
            sol.result == eqlx.RESULTS.successful,
            (of_linear.a, of_linear.b, of_u),
            seen.num_steps,
            seen.num_failed == 0,
        )

    return jax.vmap(one)(linears, us, alphas)


def dense(linear, u, z) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The equilibrium with the units active that `z` says, and its gradients, by NumPy.

    It is the equilibrium if it is positive at those units and the others have a
    negative argument, which is checked. The gradients are those of the implicit
    function theorem with a dense inverse.
    """
    a, b, u = (np.asarray(x) for x in (linear.a, linear.b, u))
    eye = np.eye(len(u))
    w = (1 - linear.margin) * eye - a.T @ a + b - b.T
    active = np.diag((np.asarray(z) > 0).astype(float))
    exact = np.linalg.solve(eye - active @ w, active @ u)
    assert np.all(exact >= 0)
    assert np.all((w @ exact + u > 0) == np.diag(active))
    weights = np.arange(1.0, 1 + len(u)) / len(u)
    ct_u = active @ np.linalg.inv(eye - active @ w).T @ weights
    ct_w = np.outer(ct_u, exact)
    return exact, (-a @ (ct_w + ct_w.T), ct_w - ct_w.T, ct_u)


def bounds(linears) -> np.ndarray:
    """`2 m / L^2` of each."""
    ws = np.asarray(jax.vmap(lambda linear: linear.matrix())(linears))
    norms = np.linalg.norm(np.eye(ws.shape[-1]) - ws, 2, axis=(1, 2))
    return 2 * linears.margin / norms**2


def limits(linears, z) -> np.ndarray:
    """The `alpha` to which forward-backward converges near the equilibria `z`.

    Near one the step is that of the active units, with the eigenvalues `1 - alpha l`,
    and `|1 - alpha l| < 1` says `alpha < 2 Re(l) / |l|^2`.
    """
    ws = np.asarray(jax.vmap(lambda linear: linear.matrix())(linears))
    found = []
    for w, active in zip(ws, np.asarray(z) > 0, strict=True):
        matrix = (np.eye(len(w)) - w)[np.ix_(active, active)]
        values = np.linalg.eigvals(matrix)
        # A unit that is not active is at its value after one step.
        found.append(np.min(2 * values.real / np.abs(values) ** 2))
    return np.array(found)


def worst(outcome: Outcome, linears, us) -> tuple[float, float]:
    """The largest differences from the dense solution: value, and gradient, relative.

    The gradients in `A`, `B` and `u` as one vector.
    """
    errors = []
    for i, u in enumerate(us):
        linear = jtu.tree_map(lambda x, i=i: x[i], linears)
        exact, grads = dense(linear, u, outcome.z[i])
        flat = np.concatenate([x.ravel() for x in grads])
        ours = np.concatenate([np.asarray(x[i]).ravel() for x in outcome.grads])
        errors.append(
            (
                np.max(np.abs(np.asarray(outcome.z[i]) - exact)),
                np.linalg.norm(ours - flat) / np.linalg.norm(flat),
            )
        )
    value, gradient = np.max(errors, axis=0)
    return float(value), float(gradient)
