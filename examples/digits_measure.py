"""What the digits example measures: solves, spectra, the error of the gradient."""

from collections.abc import Callable
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from digits_model import Classifier, cross_entropy, gradients
from jaxtyping import Array, Float, Int


HISTORY = (
    *("train_loss", "train_accuracy", "loss", "accuracy"),
    *("forward_steps", "backward_steps", "spectral_radius"),
)
NUM_LOOKED_AT = 64  # Held-out images of which the spectra and the traces are.
COUNTS = ("solves", "failed_forward", "failed_backward", "worst_forward")


def _assess(
    model: Classifier, image: Float[Array, "64"], label: Int[Array, ""]
) -> dict[str, Array]:
    """One image: the forward solve, and the backward solve of its loss."""
    logits, sol = model(image)
    z = sol.value
    loss, ct_z = jax.value_and_grad(lambda z: cross_entropy(model.readout(z), label))(z)
    adjoint = model.layer.solve_adjoint(image, z, ct_z)
    return {
        "z": z,
        "loss": loss,
        "is_correct": jnp.argmax(logits) == label,
        "forward_steps": sol.stats["num_steps"],
        "is_forward_solved": sol.result == eqlx.RESULTS.successful,
        "backward_steps": adjoint.stats["num_steps"],
        "is_backward_solved": adjoint.stats["is_usable"],
    }


assess: Callable[[Classifier, Any, Any], dict[str, Array]] = eqx.filter_jit(
    jax.vmap(_assess, in_axes=(None, 0, 0))
)


def count(counts: dict[str, int], aux: dict[str, Any]) -> dict[str, int]:
    """Add the solves of a batch to those of the run."""
    return {
        "solves": counts["solves"] + aux["forward_steps"].size,
        "failed_forward": counts["failed_forward"]
        + int(np.sum(~aux["is_forward_solved"])),
        "failed_backward": counts["failed_backward"]
        + int(np.sum(~aux["is_backward_solved"])),
        "worst_forward": max(
            counts["worst_forward"], int(np.max(aux["forward_steps"]))
        ),
    }


def _arrays(model: Classifier) -> list[np.ndarray]:
    cell: Any = model.layer.cell
    readout = model.readout
    arrays = (cell.weight, cell.injection, cell.bias, readout.weight, readout.bias)
    return [np.asarray(x, np.float64) for x in arrays]


def spectral_radius(model: Classifier, z: np.ndarray) -> float:
    """Of the Jacobian `diag(1 - z^2) W`, the largest over the equilibria `z`."""
    weight, *_ = _arrays(model)
    jacobians = (1 - z.astype(np.float64) ** 2)[:, :, None] * weight
    return float(np.max(np.abs(np.linalg.eigvals(jacobians))))


def summarise(model: Classifier, aux: dict[str, Any]) -> dict[str, float]:
    """The row of the history that belongs to an assessment."""
    return {
        "loss": float(np.mean(aux["loss"])),
        "accuracy": float(np.mean(aux["is_correct"])),
        "forward_steps": float(np.mean(aux["forward_steps"])),
        "backward_steps": float(np.mean(aux["backward_steps"])),
        "spectral_radius": spectral_radius(model, aux["z"][:NUM_LOOKED_AT]),
    }


def dense_gradient(
    model: Classifier, images: np.ndarray, labels: np.ndarray
) -> list[np.ndarray]:
    """The gradient of the mean loss in float64, by hand: nothing of JAX is in it.

    Newton's method with dense Jacobians for each equilibrium, and `(I - J)^-T` by a
    dense inverse.
    """
    w, injection, bias, readout, readout_bias = _arrays(model)
    total = [np.zeros_like(x) for x in (w, injection, bias, readout, readout_bias)]
    eye = np.eye(len(bias))
    for x, label in zip(images.astype(np.float64), labels, strict=True):
        z = np.zeros_like(bias)
        for _ in range(20):  # To where Newton's method converges.
            z = np.tanh(w @ z + injection @ x + bias)
        for _ in range(50):
            f = np.tanh(w @ z + injection @ x + bias)
            step = np.linalg.solve(eye - (1 - f**2)[:, None] * w, f - z)
            z = z + step
            if np.max(np.abs(step)) < 1e-14:
                break
        else:
            raise ArithmeticError("Newton's method did not converge in float64.")
        logits = readout @ z + readout_bias
        ct_logits = np.exp(logits - np.max(logits))
        ct_logits /= np.sum(ct_logits)
        ct_logits[label] -= 1
        slope = 1 - z**2
        u = np.linalg.inv(eye - slope[:, None] * w).T @ (readout.T @ ct_logits)
        ct = slope * u
        terms = (np.outer(ct, z), np.outer(ct, x), ct, np.outer(ct_logits, z))
        for sum_, term in zip(total, (*terms, ct_logits), strict=True):
            sum_ += term / len(labels)
    return total


def gradient_error(model: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """The error of the implicit gradient, all parameters as one vector, 2-norm."""
    grads, _ = gradients(model, jnp.asarray(images), jnp.asarray(labels))
    exact = np.concatenate([x.ravel() for x in dense_gradient(model, images, labels)])
    got = np.concatenate([x.ravel() for x in _arrays(grads)])
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def traces(model: Classifier, images: np.ndarray) -> dict[str, np.ndarray]:
    """The residuals of a batch, step by step, with the model's solver and without."""
    solver, layer = model.layer.solver, model.layer
    plain = eqlx.FixedPointIteration(rtol=solver.rtol, atol=solver.atol)

    def trace(solver, image):
        traced = eqlx.nn.FixedPointLayer(
            layer.cell, eqlx.Traced(solver), batching=layer.batching
        )
        return traced.solve(image).stats["trace"]

    run = eqx.filter_jit(jax.vmap(trace, in_axes=(None, 0)))
    solvers = {"plain iteration": plain, "Anderson": solver}
    return {name: np.asarray(run(s, images)) for name, s in solvers.items()}
