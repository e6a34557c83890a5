"""What the multiscale example measures: solves, and the error of the gradient."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from multiscale_model import assess, Classifier, cross_entropy, gradients


def summarise(
    model: Classifier, images: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """The figures of the history that belong to an assessment."""
    aux = jax.device_get(assess(model, jnp.asarray(images), jnp.asarray(labels)))
    return {
        "held_out_loss": np.mean(aux["loss"]),
        "accuracy": np.mean(aux["is_correct"]),
        "steps": np.mean(aux["steps"]),
        "failed": np.sum(~aux["is_solved"]),
    }


@eqx.filter_jit
def _one_by_newton(model: Classifier, image, label, z):
    """The gradient of one image's loss, by dense matrices throughout."""
    image = image.reshape(1, 8, 8)
    start, unravel = ravel_pytree(z)
    fn = lambda y, model: ravel_pytree(model.layer.cell(unravel(y), image))[0]
    jacobian = jax.jacfwd(fn)
    eye = jnp.eye(start.size)

    def step(_, y):
        return y + jnp.linalg.solve(eye - jacobian(y, model), fn(y, model) - y)

    y = jax.lax.fori_loop(0, 10, step, start)
    loss = lambda model, y: cross_entropy(model.read(unravel(y)), label)
    direct, (ct_y,) = eqx.filter_grad(loss)(model, y), (jax.grad(loss, 1)(model, y),)
    u = jnp.linalg.solve((eye - jacobian(y, model)).T, ct_y)
    through = eqx.filter_grad(lambda model: fn(y, model) @ u)(model)
    residual = jnp.max(jnp.abs(fn(y, model) - y))
    return ravel_pytree(eqx.apply_updates(direct, through))[0], residual


def dense_gradient(
    model: Classifier, images: np.ndarray, labels: np.ndarray, z: Any
) -> np.ndarray:
    """The gradient of the mean loss in float64: no solver and no rule of `equilax`.

    Newton's method with dense Jacobians for each equilibrium, and a dense solve with
    `(I - J)^T`. It is NaN where that does not converge.

    **Arguments:**

    - `z`: Where Newton's method starts, for each image: near the equilibrium.
    """
    with jax.enable_x64(True):
        double = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        is_real = eqx.is_inexact_array
        model = jtu.tree_map(lambda x: double(x) if is_real(x) else x, model)
        total: Any = 0.0
        for i, label in enumerate(labels):
            start = jtu.tree_map(lambda x, i=i: double(x[i]), z)
            grad, residual = _one_by_newton(
                model, double(images[i]), jnp.asarray(label), start
            )
            total = total + np.asarray(grad) / len(labels)
            total = np.where(residual < 1e-12, total, np.nan)
    return total


def gradient_error(
    model: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    z: Any,
    *,
    batch_size: int,
) -> float:
    """The error of the implicit gradient, all parameters as one vector, 2-norm.

    **Arguments:**

    - `z`: As for `dense_gradient`.
    - `batch_size`: That of the training, of whose program the images fill a batch.
    """
    repeats = batch_size // len(labels)
    batch = jnp.tile(images, (repeats, 1)), jnp.tile(labels, repeats)
    zero = jnp.zeros(())
    grads, _ = gradients(model, *batch, zero, jr.key(0))
    got = np.asarray(ravel_pytree(eqx.filter(grads, eqx.is_inexact_array))[0])
    exact = dense_gradient(model, images, labels, z)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
