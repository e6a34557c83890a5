"""The language example, `examples/language.py`, run as its readers run it."""

import importlib
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equilax as eqlx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from .processes import finish, start


pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("tqdm")

_SCRIPT = Path(__file__).parents[1] / "examples" / "language.py"
_NUM_STEPS = 12
_SIZES = {"features": 16, "heads": 2, "width": 16, "length": 16, "batch-size": 4}
_FLAGS = [f"--{k}={v}" for k, v in _SIZES.items()]


@pytest.fixture(scope="module")
def run_example(tmp_path_factory):
    # What one run has compiled, the next need not.
    cache = tmp_path_factory.mktemp("cache")
    names = ("JAX_PLATFORMS", "XLA_FLAGS")
    env = {k: os.environ[k] for k in names if k in os.environ}
    env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

    def run(*flags: object, signalled: tuple = ()) -> SimpleNamespace:
        flags = ("--quick", f"--steps={_NUM_STEPS}", *_FLAGS, *flags)
        process = start(_SCRIPT, *flags, signalled=signalled, env=env)
        return finish(process, timeout=240)

    return run


@pytest.fixture(scope="module")
def quick(run_example, tmp_path_factory) -> SimpleNamespace:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("quick") / "a" / "b"
    result = run_example("--out", out)
    assert result.code == 0, result.stderr
    result.out = out
    return result


def _metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def import_example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPT.parent))
        yield importlib.import_module


@pytest.mark.slow
def test_a_quick_run_reports_both_models_and_all_its_solves(quick):
    metrics = _metrics(quick.out)
    names = ["equilibrium", "baseline"]
    for name in names:
        m = metrics[name]
        assert m["steps"] == _NUM_STEPS
        # Of a model that says nothing the loss is that of the uniform distribution.
        assert m["history"]["loss"][0] == pytest.approx(np.log(92), abs=0.8)
        assert np.log(5) < m["loss"] < m["history"]["loss"][0]
        assert f"{m['loss']:.4f}" in quick.stdout
    assert metrics["equilibrium"]["solves"] == _NUM_STEPS * _SIZES["batch-size"]
    assert metrics["equilibrium"]["failed_forward"] == 0
    assert metrics["equilibrium"]["failed_backward"] == 0
    assert metrics["equilibrium"]["held_out_failed"] == 0
    assert metrics["baseline"]["solves"] == 0
    assert metrics["baseline"]["evaluations"] == 1
    # Both begin with the same parameters and batches, but not with the same output.
    first = [metrics[name]["history"]["loss"][0] for name in names]
    assert 0 < abs(first[0] - first[1]) < 0.5
    assert abs(metrics["loss_usual"] - metrics["equilibrium"]["loss"]) < 1e-2
    assert metrics["failed_tight"] == 0
    assert metrics["leak_tight"] < 1e-3
    assert len(metrics["written"]) == 200
    assert metrics["written"] in quick.stdout


@pytest.mark.slow
def test_a_quick_run_leaves_its_files_and_no_others(quick):
    assert sorted(os.listdir(quick.out)) == [
        *("baseline.eqx", "baseline.final.eqx", "equilibrium.eqx"),
        *("equilibrium.final.eqx", "language.png", "metrics.json"),
    ]
    picture = (quick.out / "language.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 20_000 < len(picture) < 200_000


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL.")
def test_a_run_killed_in_each_training_ends_as_if_it_never_had_been(
    quick, run_example, tmp_path
):
    flags = ("--resume", "--save-every", 5, "--out", tmp_path)
    # In the eighth step of the first model, three after its last checkpoint.
    kill = (int(signal.SIGKILL), "language_model", "update")
    first = run_example(*flags, signalled=(*kill, 8))
    assert first.code == -signal.SIGKILL, first.stderr
    # Seven steps are left to the first model: this is the second of the other.
    second = run_example(*flags, signalled=(*kill, 9))
    assert second.code == -signal.SIGKILL, second.stderr
    path = tmp_path / "equilibrium.eqx"
    assert f"Going on from {path}, after 5 steps." in second.stdout
    last = run_example(*flags)
    assert last.code == 0, last.stderr
    assert f"Going on from {path}, after 12 steps." in last.stdout
    for name in ("equilibrium", "baseline"):
        final = f"{name}.final.eqx"
        assert (tmp_path / final).read_bytes() == (quick.out / final).read_bytes()
    metrics, expected = _metrics(tmp_path), _metrics(quick.out)
    for tree in (metrics, expected):
        for name in ("equilibrium", "baseline"):
            assert tree[name].pop("seconds") > 0
            del tree[name]["seconds_a_step"]
    assert metrics == expected


def test_no_paragraph_held_out_is_trained_on(import_example):
    data = import_example("language_data")
    import_topics = importlib.import_module("pydoc_data.topics")
    topics = import_topics.topics
    train, held_out = data.split(topics)
    words = lambda text: [re.sub(r"\s+", " ", p).strip() for p in text.split("\n\n")]
    train_words, held_out_words = words(train), words(held_out)
    assert not set(train_words) & set(held_out_words)
    # Whole topics are held out, each with all of its paragraphs, and every other
    # paragraph is trained on.
    whole = [k for k in topics if set(words(topics[k])) - {""} <= set(held_out_words)]
    assert len(whole) >= len(topics) // data.HELD_OUT_EVERY
    everything = {w for k in topics for w in words(topics[k])} - {""}
    assert set(train_words) | set(held_out_words) == everything
    assert 0.1 < len(held_out) / (len(train) + len(held_out)) < 0.3


def test_characters_survive_their_encoding_and_rare_ones_become_one(import_example):
    data = import_example("language_data")
    text = data.load_text()
    train, _ = data.split(import_example("pydoc_data.topics").topics)
    decoded = "".join(text.characters[i] for i in text.train)
    assert len(decoded) == len(train)
    changed = {(a, b) for a, b in zip(train, decoded, strict=True) if a != b}
    assert all(b == data.UNKNOWN for _, b in changed)
    assert np.mean(text.train == text.characters.index(data.UNKNOWN)) < 1e-3


def test_batches_depend_on_the_seed_and_the_step_alone(import_example):
    data = import_example("language_data")
    symbols = np.arange(10_000)
    take = lambda **kwargs: data.batch(symbols, 8, 16, **kwargs)
    first = take(seed=3, step=5)
    assert first.shape == (8, 17)
    # Each is a piece of the text.
    assert np.array_equal(first, first[:, :1] + np.arange(17))
    take(seed=3, step=4)
    assert np.array_equal(take(seed=3, step=5), first)
    for other in (take(seed=3, step=6), take(seed=4, step=5)):
        assert not np.array_equal(other, first)
    rows = data.windows(symbols, 16)
    assert np.array_equal(rows[:-1, -1], rows[1:, 0])
    assert np.array_equal(rows[:, :-1].ravel(), symbols[: rows[:, :-1].size])


def _tight(import_example, *, adjoint) -> Any:
    """A tiny model in float64, solved to the level of rounding."""
    model = import_example("language_model")
    made = model.equilibrium_model(7, model.Sizes(8, 2, 8), key=jr.key(0))
    layer = eqlx.nn.FixedPointLayer(
        made.layer.cell,
        eqlx.Anderson(rtol=1e-11, atol=1e-11),
        adjoint=adjoint,
        max_steps=200,
    )
    return eqx.tree_at(lambda m: m.layer, made, layer)


def _unrolled(model, row):
    """The loss of a window after 200 applications of the cell."""
    x = jax.vmap(model.embedding)(row[:-1])
    cell = model.layer.cell
    z, _ = jax.lax.scan(lambda z, _: (cell(z, x), None), cell.init(x), length=200)
    log_p = jax.nn.log_softmax(jax.vmap(model.readout)(z), axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_p, row[1:, None], axis=1))


def test_the_gradient_of_the_loss_is_that_of_an_unrolled_one(
    import_example, getkey, monkeypatch
):
    language_model = import_example("language_model")
    monkeypatch.setattr(language_model, "PENALTY", 0.0)
    rows = jr.randint(getkey(), (3, 7), 0, 7)

    def unrolled(model):
        return jnp.mean(jax.vmap(lambda row: _unrolled(model, row))(rows))

    exact = _tight(import_example, adjoint=eqlx.ImplicitAdjoint())
    truncated = _tight(import_example, adjoint=eqlx.ImplicitAdjoint(eqlx.Neumann(0)))
    expected = eqx.filter_jit(eqx.filter_grad(unrolled))(exact)
    gradients = eqx.filter_jit(language_model.gradients)
    flat = lambda tree: jnp.concatenate([x.ravel() for x in jtu.tree_leaves(tree)])
    errors = []
    for model in (exact, truncated):
        grads, figures = gradients(model, rows, getkey())
        assert figures["failed_forward"] == 0
        difference = flat(grads) - flat(expected)
        errors.append(jnp.linalg.norm(difference) / jnp.linalg.norm(flat(expected)))
    # What a tolerance of 1e-11 does to a gradient is a small multiple of it; a
    # truncated series is another gradient.
    assert errors[0] < 1e-8
    assert errors[1] > 1e-2


def test_what_is_said_of_a_character_does_not_depend_on_those_that_follow(
    import_example, getkey
):
    model = _tight(import_example, adjoint=eqlx.ImplicitAdjoint())
    baseline = import_example("language_model").baseline_of(model)
    row = jr.randint(getkey(), (9,), 0, 7)
    for place in (3, 6):
        other = row.at[place:].set((row[place:] + 1) % 7)
        for each, tolerance in ((model, 1e-9), (baseline, 1e-14)):
            run = eqx.filter_jit(lambda symbols, each=each: each(symbols)[0])
            difference = jnp.max(jnp.abs(run(row) - run(other)), axis=1)
            assert jnp.all(difference[:place] < tolerance)
            assert jnp.all(difference[place:] > 1e-3)
