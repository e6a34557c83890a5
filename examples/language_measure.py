"""What the language example measures on text that was held out, and how it writes."""

import dataclasses

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray
from language_data import batches
from language_model import cross_entropies, LanguageModel


_NUM_SPECTRA = 4  # Windows.
_AT_ONCE = 64
TIGHT = 1e-4
_NUM_TERMS = 24


@eqx.filter_jit
def assess(model: LanguageModel, rows: Int[Array, "windows _"]) -> dict[str, Array]:
    """A row of the history."""
    logits, sol = jax.vmap(lambda row: model(row[:-1]))(rows)
    figures = {"held_out_loss": jnp.mean(cross_entropies(logits, rows[:, 1:]))}
    if sol is None:
        return figures

    def radius(row, z):
        fn, _, args = model.problem(row[:-1])
        return eqlx.spectral_radius(fn, z, args, key=jr.key(0))

    n = min(_NUM_SPECTRA, len(rows))
    radii = jax.vmap(radius)(rows[:n], sol.value[:n])
    return figures | {"spectral_radius": jnp.mean(radii)}


@eqx.filter_jit
def _look(model, rows):
    logits, sol = jax.vmap(lambda row: model(row[:-1]))(rows)
    losses = cross_entropies(logits, rows[:, 1:])
    if sol is None:
        return losses, jnp.ones(len(rows), int), jnp.zeros(len(rows), bool)
    is_failed = sol.result != eqlx.RESULTS.successful
    return losses, sol.stats["num_steps"], is_failed


def look(model: LanguageModel, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Loss of each character, steps and failure of each window, for all windows."""
    parts = [_look(model, part) for part in batches(rows, min(_AT_ONCE, len(rows)))]
    losses, steps, is_failed = (np.concatenate(x) for x in zip(*parts, strict=True))
    return {"losses": losses, "steps": steps, "is_failed": is_failed}


def tightly(model: LanguageModel) -> LanguageModel:
    """The same model, solved to a tolerance a hundred times smaller."""
    solver = dataclasses.replace(model.layer.solver, rtol=TIGHT, atol=TIGHT)
    # The windows now take steps of very different numbers.
    layer = dataclasses.replace(
        model.layer, solver=solver, batching=eqlx.Staged(), max_steps=256
    )
    return dataclasses.replace(model, layer=layer)


def leak(model: LanguageModel, rows: np.ndarray) -> float:
    """By how much the losses of the first half change with the second, in rms.

    The equilibrium is causal. An iterate of Anderson's is so to the tolerance only: its
    weights are those of the whole sequence.
    """
    rows = rows[:_AT_ONCE]
    half = rows.shape[1] // 2
    others = np.concatenate([rows[:, : half + 1], rows[::-1, half + 1 :]], axis=1)
    before, after = (_look(model, x)[0][:, :half] for x in (rows, others))
    return float(jnp.sqrt(jnp.mean((after - before) ** 2)))


@eqx.filter_jit
def losses_by_steps(
    model: LanguageModel, rows: Int[Array, "windows _"]
) -> dict[str, Array]:
    """The held-out loss if the solve is stopped after so many steps, and residuals."""

    def one(solver, row):
        fn, z0, args = model.problem(row[:-1])
        zs = eqlx.iterates(fn, solver, z0, args, indices=range(1, _NUM_TERMS + 1))
        logits = jax.vmap(jax.vmap(model.readout))(zs)
        new = jax.vmap(lambda z: fn(z, args))(zs)
        residuals = jax.vmap(eqlx.rms_norm)(new - zs)
        labels = jnp.broadcast_to(row[1:], (_NUM_TERMS, len(row) - 1))
        return jnp.mean(cross_entropies(logits, labels), axis=1), residuals

    plain = eqlx.FixedPointIteration(rtol=0.0, atol=0.0)
    anderson = dataclasses.replace(model.layer.solver, rtol=0.0, atol=0.0)
    found = {}
    for name, solver in (("plain iteration", plain), ("Anderson", anderson)):
        losses, residuals = jax.vmap(lambda row, s=solver: one(s, row))(rows)
        found[name] = jnp.mean(losses, axis=0), residuals
    return found


@eqx.filter_jit
def _write(model, window, num_characters, temperature, is_warm, key):
    def write(carry, key):
        window, z = carry
        logits, sol = model(window, z0=jnp.where(is_warm, z, jnp.zeros_like(z)))
        new = jr.categorical(key, logits[-1] / temperature).astype(window.dtype)
        # All move on by one place, and with them the state: rotary positions are
        # relative.
        window = jnp.append(window[1:], new)
        z = jnp.concatenate([sol.value[1:], sol.value[-1:]])
        return (window, z), (new, sol.stats["num_steps"])

    _, z0, _ = model.problem(window)
    keys = jr.split(key, num_characters)
    _, (symbols, num_steps) = lax.scan(write, (window, z0), keys)
    return symbols, num_steps


def write(
    model: LanguageModel,
    window: Int[Array, " length"],
    characters: str,
    *,
    num_characters: int = 200,
    temperature: float = 0.8,
    is_warm: bool = True,
    key: PRNGKeyArray,
) -> tuple[str, np.ndarray]:
    """Go on with a text, drawn at random character by character.

    **Arguments:**

    - `window`: What the text begins with, of the length that training had.
    - `is_warm`: Whether a solve starts at the solution before, moved on by one place.

    **Returns:**

    The text, and the steps of each solve.
    """
    symbols, num_steps = _write(
        model, window, num_characters, temperature, jnp.array(is_warm), key
    )
    return "".join(characters[i] for i in np.asarray(symbols)), np.asarray(num_steps)
