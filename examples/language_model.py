"""The language model, its loss, its gradient and its optimiser."""

from typing import Any, NamedTuple

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar
from optimiser import take_step


TOLERANCE = 1e-2
MAX_STEPS = 40
# Of the Neumann series that is taken for the gradient. It is rough, but in a trial of
# 300 steps it trained no worse than the exact one, in 0.6 of the processor time.
NUM_TERMS = 3
# Of the Jacobian, and of parameters below: they keep the equilibrium from being lost,
# as does a learning rate that is lower than a single block would bear.
PENALTY = 0.01
_NUM_PENALISED = 8  # Windows of a batch.
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.3

_Symbols = Int[Array, " length"]
_Rows = Int[Array, "batch length_and_one"]


class Sizes(NamedTuple):
    features: int
    heads: int
    width: int


class Once(eqx.Module):
    """In place of the layer: its cell applied once, as in a model of one block."""

    cell: eqlx.nn.TransformerCell

    def __call__(
        self, x: Float[Array, "length features"]
    ) -> Float[Array, "length features"]:
        return self.cell(self.cell.init(x), x)


class LanguageModel(eqx.Module):
    """Which character comes next, at each position of a text.

    The state is a sequence, and what is read out is its equilibrium `z = cell(z, x)`
    under attention to the past, or, of the baseline, what comes of one application.
    """

    embedding: eqx.nn.Embedding
    layer: Any  # An `equilax.nn.FixedPointLayer`, or `Once`.
    readout: eqx.nn.Linear

    def __call__(
        self,
        symbols: _Symbols,
        *,
        z0: Float[Array, "length features"] | None = None,
        monitor: eqlx.AdjointMonitor | None = None,
    ) -> tuple[Float[Array, "length symbols"], eqlx.Solution | None]:
        x = jax.vmap(self.embedding)(symbols)
        if isinstance(self.layer, Once):
            return jax.vmap(self.readout)(self.layer(x)), None
        sol = self.layer.solve(x, z0=z0, monitor=monitor)
        return jax.vmap(self.readout)(sol.value), sol

    def problem(self, symbols: _Symbols):
        """The fixed-point problem of a window: function, start and arguments."""
        return self.layer.problem(jax.vmap(self.embedding)(symbols))


def equilibrium_model(
    num_symbols: int, sizes: Sizes, *, key: PRNGKeyArray
) -> LanguageModel:
    e_key, c_key, r_key = jr.split(key, 3)
    d = sizes.features
    cell = eqlx.nn.TransformerCell(
        d,
        d,
        sizes.heads,
        sizes.width,
        causal=True,
        position=eqx.nn.RotaryPositionalEmbedding(d // sizes.heads),
        key=c_key,
    )
    layer = eqlx.nn.FixedPointLayer(
        cell,
        # The state is normalised: of size one, so both tolerances mean the same.
        eqlx.Anderson(rtol=TOLERANCE, atol=TOLERANCE, norm=eqlx.rms_norm),
        adjoint=eqlx.ImplicitAdjoint(eqlx.Neumann(NUM_TERMS)),
        # The windows of a batch take alike many steps, and one loop compiles fastest.
        batching=eqlx.Lockstep(),
        max_steps=MAX_STEPS,
    )
    return LanguageModel(
        eqx.nn.Embedding(num_symbols, d, key=e_key),
        layer,
        eqx.nn.Linear(d, num_symbols, key=r_key),
    )


def baseline_of(model: LanguageModel) -> LanguageModel:
    """The same parameters, and one application of the cell."""
    return LanguageModel(model.embedding, Once(model.layer.cell), model.readout)


def cross_entropies(
    logits: Float[Array, "*batch length symbols"], symbols: Int[Array, "*batch length"]
) -> Float[Array, "*batch length"]:
    """In nats a character."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, symbols)


def _penalty(model: LanguageModel, rows: _Rows, zs: PyTree[Array], key) -> Scalar:
    def one(row, z, key):
        fn, _, args = model.problem(row[:-1])
        return eqlx.jacobian_penalty(fn, z, args, key=key)

    n = min(_NUM_PENALISED, len(rows))
    return jnp.mean(jax.vmap(one)(rows[:n], zs[:n], jr.split(key, n)))


def _loss(
    model_and_monitor: tuple[LanguageModel, eqlx.AdjointMonitor],
    rows: _Rows,
    key: PRNGKeyArray,
) -> tuple[Scalar, dict[str, Array]]:
    model, monitor = model_and_monitor
    logits, sol = jax.vmap(lambda row: model(row[:-1], monitor=monitor))(rows)
    loss = jnp.mean(cross_entropies(logits, rows[:, 1:]))
    if sol is None:
        return loss, {"loss": loss}
    num_steps = sol.stats["num_steps"]
    figures = {
        "loss": loss,
        "forward_steps": jnp.mean(num_steps.astype(loss.dtype)),
        "forward_steps_worst": jnp.max(num_steps),
        "failed_forward": jnp.sum(sol.result != eqlx.RESULTS.successful),
    }
    return loss + PENALTY * _penalty(model, rows, sol.value, key), figures


def gradients(
    model: LanguageModel, rows: _Rows, key: PRNGKeyArray
) -> tuple[Any, dict[str, Array]]:
    """**Arguments:**

    - `rows`: Windows of characters, and the one that follows on each.
    - `key`: Of the penalty.

    **Returns:**

    The gradient of the loss, and what happened on the way.
    """
    # What the backward pass has to say is the "gradient" of its monitor.
    value_and_grad = eqx.filter_value_and_grad(_loss, has_aux=True)
    pair = (model, eqlx.AdjointMonitor())
    (_, figures), (grads, seen) = value_and_grad(pair, rows, key)
    if "forward_steps" not in figures:
        return grads, figures
    backward = {
        "backward_steps": seen.num_steps / seen.num_solves,
        "failed_backward": seen.num_failed,
        "backward_residual": seen.residual / seen.num_solves,
    }
    return grads, figures | backward


def make_optimiser(num_steps: int) -> optax.GradientTransformation:
    """AdamW, which leaves out a batch whose gradient is not finite."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=LEARNING_RATE,
        warmup_steps=max(1, num_steps // 20),
        decay_steps=num_steps,
        end_value=LEARNING_RATE / 50,
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=WEIGHT_DECAY),
    )
    return optax.apply_if_finite(optimiser, max_consecutive_errors=10)


@eqx.filter_jit
def update(
    model: LanguageModel,
    opt_state: PyTree[Any],
    rows: _Rows,
    key: PRNGKeyArray,
    optimiser: optax.GradientTransformation,
) -> tuple[LanguageModel, PyTree[Any], dict[str, Array]]:
    grads, figures = gradients(model, rows, key)
    return *take_step(model, opt_state, grads, optimiser), figures
