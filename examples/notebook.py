"""The notebook of 2020 with which it began, told again with the library.

    python examples/notebook.py

It solved `z = tanh(W z + x)` by iteration, differentiated the solution by the implicit
function theorem, and checked the backward pass against a dense inverse. Every number
that it printed stands here, and each is printed with its difference to ours.
"""

import equilax as eqlx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np


# What the notebook printed.
Z = """ 0.00649604 -0.7015957  -0.98471504 -0.04196557 -0.61522186
       -0.48183814  0.5783122   0.95567054 -0.08373152  0.8447805"""
GRAD_OF_SUM = """ 0.00752357 -0.8125729 -1.1404755 -0.04860361 -0.7125366
                 -0.55805445  0.6697886  1.1068368 -0.09697603  0.97840637"""
GRAD_OF_FIRST = """ 0.00373198 -0.40306717 -0.5657194  -0.02410925 -0.35344535
                   -0.2768163   0.33224073  0.54903334 -0.04810381  0.48532692"""
U = """ 0.5745249  0.23003381  0.25346488 -0.03544246 -0.3168217
        0.12168527 -0.00903781  0.01450401 -0.022818   -0.15082248"""
FIRST_ROW = """ 5.74527383e-01  2.30032787e-01  2.53464580e-01 -3.54424752e-02
               -3.16821128e-01  1.21684454e-01 -9.03799478e-03  1.45050213e-02
               -2.28186548e-02 -1.50822088e-01"""

# The notebook stopped once the step *to* an iterate was shorter than 1e-5. Here a solve
# stops once the residual *at* the iterate that it returns is, and that is the step from
# it: shorter by the contraction factor, 0.669 for this W and x. So this tolerance stops
# where the notebook did. To solve a problem, rather than to meet old digits, take
# `eqlx.Anderson(rtol=1e-6, atol=1e-6)`.
SAME_STOP = 0.669e-5
SOLVER = eqlx.FixedPointIteration(rtol=0.0, atol=SAME_STOP, norm=eqlx.two_norm)
ADJOINT = eqlx.ImplicitAdjoint(eqlx.FixedPointLinearSolver(SOLVER))


def f(z, args):
    w, x = args
    return jnp.tanh(w @ z + x)


def layer(w, x):
    """The equilibrium. JAX differentiates it like any other function."""
    z0 = jnp.zeros_like(x)
    return eqlx.fixed_point(f, SOLVER, z0, (w, x), adjoint=ADJOINT).value


def compare(title, got, printed=None, expected=None):
    if printed is not None:
        expected = np.array([float(number) for number in printed.split()])
    got = np.asarray(got)
    print(f"\n{title}")
    print(np.array2string(got, precision=8, suppress_small=True, max_line_width=88))
    against = "printed in 2020" if printed is not None else "computed above"
    print(
        f"  largest difference to what was {against}: {np.max(abs(got - expected)):.1e}"
    )


def main():
    ndim = 10
    # The random numbers of the time.
    with jax.threefry_partitionable(False):
        w = jr.normal(jr.PRNGKey(0), (ndim, ndim)) / jnp.sqrt(ndim)
        x = jr.normal(jr.PRNGKey(1), (ndim,))

    sol = eqlx.fixed_point(f, SOLVER, jnp.zeros(ndim), (w, x))
    compare("z, the fixed point of tanh(W z + x)", sol.value, Z)
    print(
        f"  {int(sol.stats['num_steps'])} steps, {int(sol.stats['num_fn_evals'])} "
        f"evaluations of f, residual {float(sol.stats['residual']):.1e}"
    )

    grad = jax.grad(lambda w: layer(w, x).sum())(w)
    compare("d sum(z) / dW, its first row", grad[0], GRAD_OF_SUM)
    grad = jax.grad(lambda w: layer(w, x)[0])(w)
    compare("d z[0] / dW, its first row", grad[0], GRAD_OF_FIRST)

    # The backward pass taken apart. The derivative of z[0] has the cotangent e_0, and
    # u = J^T u + e_0 is a fixed point like the one before it.
    z, e_0 = sol.value, jnp.zeros(ndim).at[0].set(1)
    _, vjp_z = jax.vjp(lambda z: f(z, (w, x)), z)
    adjoint = eqlx.fixed_point(lambda u, _: vjp_z(u)[0] + e_0, SOLVER, jnp.zeros(ndim))
    u = adjoint.value
    compare("u, the solution of the adjoint equation for e_0", u, U)
    _, vjp_w = jax.vjp(lambda w: f(z, (w, x)), w)
    compare("d z[0] / dW again, from u", vjp_w(u)[0][0], expected=np.asarray(grad[0]))

    # The same as a linear system, in the words of Lineax.
    _, jvp_z = jax.linearize(lambda z: f(z, (w, x)), z)
    operator = lx.FunctionLinearOperator(lambda t: t - jvp_z(t), jax.typeof(z))
    linear = lx.linear_solve(operator.T, e_0, eqlx.FixedPointLinearSolver(SOLVER))
    compare("u again, by lineax.linear_solve", linear.value, U)

    # And densely.
    jacobian = jax.jacobian(lambda z: f(z, (w, x)))(z)
    inverse = jnp.linalg.inv(jnp.eye(ndim) - jacobian)
    compare("the dense (I - J)^-1, its first row", inverse[0], FIRST_ROW)
    compare("e_0 (I - J)^-1, which is u", e_0 @ inverse, expected=np.asarray(u))


if __name__ == "__main__":
    main()
