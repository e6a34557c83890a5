"""The graph example, `examples/graph.py`, run as its readers run it."""

import importlib
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from .processes import finish, start


pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("tqdm")

_SCRIPT = Path(__file__).parents[1] / "examples" / "graph.py"


def _run(*flags: object, signalled: tuple = ()) -> SimpleNamespace:
    return finish(start(_SCRIPT, *flags, signalled=signalled), timeout=240)


_FLAGS = ("--steps", 40, "--nodes", 40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """A run that nothing interrupts, long enough to learn."""
    out = tmp_path_factory.mktemp("graph")
    result = _run(*_FLAGS, "--out", out)
    assert result.code == 0, result.stderr
    result.out = out
    result.metrics = json.loads((out / "metrics.json").read_text())
    return result


@pytest.mark.slow
def test_an_equilibrium_reaches_further_than_layers(whole):
    models = whole.metrics["models"]
    assert len({m["parameters"] for m in models.values()}) == 1
    accuracy = {name: m["accuracy"] for name, m in models.items()}
    assert all(a[1] > 0.95 for a in accuracy.values())
    assert accuracy["equilibrium"][39] > 0.95
    # Of two classes: chance is a half, give or take three deviations of 200 draws.
    for name, depth in (("8 layers", 8), ("32 layers", 32)):
        assert all(0.39 < a < 0.61 for a in accuracy[name][depth:])
        assert not np.any(models[name]["size"][depth:])
    assert 40 < models["equilibrium"]["steps"] < 300
    assert sum(m["failed"] + m["failed_in_training"] for m in models.values()) == 0


@pytest.mark.slow
def test_it_says_what_it_did_and_leaves_its_files(whole):
    row = re.search(r"^accuracy after 20 edges +(.*)$", whole.stdout, re.MULTILINE)
    assert row is not None
    accuracy = [m["accuracy"][20] for m in whole.metrics["models"].values()]
    assert row[1].split() == [f"{a:.1%}" for a in accuracy]
    assert whole.metrics["sha256"] in whole.stdout
    # How often the last step is shown before a bar ends its line depends on the time.
    last = [line.split("\r")[-1] for line in whole.stderr.split("\n")]
    assert sum(line.startswith("step 40/40") for line in last) == 3
    names = ["32_layers.eqx", "8_layers.eqx", "equilibrium.eqx"]
    names += ["final.eqx", "graph.png", "metrics.json"]
    assert sorted(os.listdir(whole.out)) == names
    picture = (whole.out / "graph.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 10_000 < len(picture) < 100_000


@pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL.")
@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_as_if_it_never_had_been(whole, tmp_path):
    # Amid the second model, six steps after a checkpoint; the others are done.
    for name in ("equilibrium", "32_layers"):
        shutil.copy(whole.out / f"{name}.eqx", tmp_path)
    flags = (*_FLAGS, "--save-every", 10, "--out", tmp_path, "--resume")
    where = (int(signal.SIGKILL), "graph_model", "train_step", 27)
    killed = _run(*flags, signalled=where)
    assert killed.code == -signal.SIGKILL, killed.stderr
    last = _run(*flags)
    assert last.code == 0, last.stderr
    assert f"Going on from {tmp_path / 'equilibrium.eqx'}, after 40" in last.stdout
    assert f"Going on from {tmp_path / '8_layers.eqx'}, after 20" in last.stdout
    ends = [(out / "final.eqx").read_bytes() for out in (whole.out, tmp_path)]
    assert ends[0] == ends[1]


@pytest.fixture(scope="module")
def import_example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPT.parent))
        yield importlib.import_module


def test_a_chain_listens_to_the_node_before(import_example):
    # Half to itself and half to the one before; each end has one edge less.
    expected = np.zeros((4, 4))
    for i in range(4):
        row, column = 1 + (i > 0), 1 + (i < 3)
        expected[i, i] = 1 / np.sqrt(row * column)
        if i > 0:
            expected[i, i - 1] = 1 / np.sqrt(row * 2)
    found = import_example("graph_data").chain(4).todense()
    assert np.max(np.abs(found - expected)) < 1e-12


def test_layers_are_blind_beyond_their_number_and_the_equilibrium_is_not(
    import_example, getkey
):
    data, model = import_example("graph_data"), import_example("graph_model")
    adjacency = data.chain(6)

    def sensitivity(depth):
        classifier = model.Classifier(4, depth, key=jr.key(0))
        state = lambda x: classifier.states((x, adjacency))[0]
        x = jr.normal(getkey(), (6, data.NUM_CLASSES))
        _, tangent = jax.jvp(state, (x,), (jnp.zeros_like(x).at[0].set(1.0),))
        return np.linalg.norm(tangent, axis=-1)

    seen = sensitivity(3)
    assert np.all(seen[:3] > 0)
    assert not np.any(seen[3:])
    assert np.all(sensitivity(None) > 0)


def test_a_batch_shows_the_class_on_the_first_node_alone(import_example):
    batch = import_example("graph_data").batch
    inputs, labels = batch(500, 5, seed=0, step=3)
    assert not np.any(inputs[:, 1:])
    assert np.mean(np.argmax(inputs[:, 0], axis=-1) == labels) > 0.97
    again, other = batch(500, 5, seed=0, step=3), batch(500, 5, seed=0, step=4)
    assert np.array_equal(again[0], inputs)
    assert not np.array_equal(other[0], inputs)
