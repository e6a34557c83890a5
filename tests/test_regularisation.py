"""The benchmark of Jacobian regularisation, `bench/regularisation.py`, made small."""

import sys

import jax
import numpy as np
import pytest


pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from bench import regularisation


@pytest.fixture(scope="module")
def runs():
    data = regularisation.load_data()
    run = lambda weight: regularisation.run(weight, 0, data=data, epochs=5, features=24)
    with jax.numpy_dtype_promotion("standard"):  # Optax promotes.
        found = {weight: run(weight) for weight in (0.0, 4.0)}
    return data, found


def test_the_penalty_saves_steps_and_no_accuracy(runs):
    _, found = runs
    (_, without), (_, penalised) = found.values()
    assert set(without) == set(regularisation.HISTORY)
    for name in ("forward", "backward", "held_out_steps"):
        # Those of no penalty become no fewer in training.
        assert penalised[name][-1] < 2 / 3 * without[name][-1]
        assert without[name][-1] > 0.9 * without[name][0]
    assert penalised["radius"][-1] < 0.7 * without["radius"][-1]
    assert penalised["accuracy"][-1] > without["accuracy"][-1] - 0.02 > 0.85
    assert np.all(penalised["failed"] == 0)


def test_what_is_measured_is_what_numpy_finds(runs):
    (_, _, images, labels), found = runs
    for model, history in found.values():
        cell, readout = model.layer.cell, model.readout
        arrays = (cell.weight, cell.injection, cell.bias, readout.weight, readout.bias)
        w, u, b, v, c = (np.asarray(x, np.float64) for x in arrays)
        x = np.asarray(images)
        z = np.zeros((len(x), len(b)))
        for _ in range(2000):
            z = np.maximum(z @ w.T + x @ u.T + b, 0)
        found = np.argmax(z @ v.T + c, axis=1)
        # The tolerance moves logits by about 1e-4: it may turn an image, not two.
        accuracy = np.mean(found == np.asarray(labels))
        assert abs(accuracy - history["accuracy"][-1]) < 1.5 / len(labels)
        jacobians = (z[:64] > 0)[:, :, None] * w
        # 32 steps of Arnoldi are exact for 24 features.
        radius = np.max(np.abs(np.linalg.eigvals(jacobians)))
        assert abs(radius - history["radius"][-1]) < 1e-6


def test_the_command_prints_a_table_and_draws(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.png"
    flags = ["--weights", "0", "2", "--seeds", "1", "--epochs", "5"]
    flags += ["--features", "24", "--plot", str(path)]
    monkeypatch.setattr(sys, "argv", ["regularisation", *flags])
    with jax.numpy_dtype_promotion("standard"):
        regularisation.main()
    printed = capsys.readouterr().out
    assert "| 0 |" in printed
    assert "| 2 |" in printed
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
