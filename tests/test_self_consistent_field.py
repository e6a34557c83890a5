"""The self-consistent field, `examples/self_consistent_field.py`, and its physics."""

import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from .processes import finish, start


pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("tqdm")

_SCRIPT = Path(__file__).parents[1] / "examples" / "self_consistent_field.py"


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("field")
    # Compiled as the tests are: in less time, for programs that run once.
    env = {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
    done = finish(start(_SCRIPT, "--quick", "--out", out, env=env), timeout=240)
    assert done.code == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    return SimpleNamespace(out=out, metrics=metrics, stdout=done.stdout)


@pytest.mark.slow
def test_only_anderson_takes_few_steps(quick):
    mixings = quick.metrics["mixings"]
    solved = {name for name, m in mixings.items() if m["is_solved"]}
    assert solved == {"plain, damped by 0.8", "Anderson"}
    assert mixings["Anderson"]["steps"] < 30
    assert mixings["plain, damped by 0.8"]["steps"] > 60


@pytest.mark.slow
def test_derivatives_are_those_of_physics_and_of_finite_differences(quick):
    energy, extent = (quick.metrics["derivatives"][k] for k in ("energy", "extent"))
    # The density is right to about its tolerance of 1e-11, the derivatives to a
    # multiple of it; differences over 1e-4 to their square and 1e-11 / 1e-4.
    assert np.allclose(energy["implicit"], energy["Hellmann-Feynman"], rtol=1e-8)
    for ways in (energy, extent):
        assert np.allclose(ways["implicit"], ways["finite differences"], rtol=1e-6)
    # At a density that stays as it is the extent would not change at all.
    assert np.min(np.abs(extent["implicit"])) > 0.01


@pytest.mark.slow
def test_a_quick_fit_gets_nearer(quick):
    history = quick.metrics["history"]
    assert len(history["loss"]) == 5
    assert history["loss"][-1] < history["loss"][0] / 2
    assert all(history["is_solved"])
    num = quick.metrics["mixings"]["Anderson"]["steps"]
    assert re.search(rf"^steps, Anderson +{num}$", quick.stdout, re.MULTILINE)
    picture = (quick.out / "self_consistent_field.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 20_000 < len(picture) < 100_000


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPT.parent))
        yield importlib.import_module("self_consistent_field_model")


def test_states_of_a_parabola_are_those_of_textbooks(model):
    frequency = 1.3
    energies, vectors = model.states(model.trap(frequency, 0.0, 0.0)())
    assert np.max(np.abs(energies - frequency * np.array([0.5, 1.5]))) < 1e-11
    x = np.asarray(model.grid())
    ground = np.sqrt(frequency / np.pi) * np.exp(-frequency * x**2)
    density = 2 * ground * (1 + 2 * frequency * x**2)
    assert np.max(np.abs(model.density_of(vectors) - density)) < 1e-10


def test_the_energy_is_that_of_its_parts(model):
    trap = model.trap(0.8, 0.0, 0.0)
    density = np.asarray(model.solve(trap).value)
    x = np.asarray(model.grid())
    pairs = model.STRENGTH / np.sqrt((x[:, None] - x) ** 2 + 1)
    repulsion = model.STEP**2 * density @ pairs @ density / 2
    outside = model.STEP * np.sum(density * (0.8 * x) ** 2 / 2)
    _, vectors = model.states(trap() + model.mean_field(jnp.asarray(density)))
    vectors = np.asarray(vectors)
    wave = 2 * np.pi * np.fft.fftfreq(x.size, model.STEP)
    # The kinetic energy by Fourier's way, which has nothing of sincs.
    slopes = np.fft.ifft(1j * wave[:, None] * np.fft.fft(vectors, axis=0), axis=0)
    kinetic = np.sum(np.abs(slopes) ** 2)
    total = model.total_energy(jnp.asarray(density), trap)
    assert abs(total - (kinetic + outside + repulsion)) < 1e-7
    # Stretching the states by a factor leaves the energy where it is, to first order:
    # the virial theorem.
    softened = ((x[:, None] - x) ** 2) / ((x[:, None] - x) ** 2 + 1)
    stretched = model.STEP**2 * density @ (pairs * softened) @ density / 2
    assert abs(2 * kinetic - 2 * outside + stretched) < 1e-6
