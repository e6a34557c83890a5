"""The digits example, `examples/digits.py`, run as its readers run it."""

import contextlib
import importlib
import json
import os
import pickle
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from .processes import finish, FULL, LARGEST, start


pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

_SCRIPT = Path(__file__).parents[1] / "examples" / "digits.py"
_TIMEOUT = 240  # Of one run, in seconds. It takes five to ten.


def _run(*flags: object, signalled: tuple = (), env=None, cwd=None) -> SimpleNamespace:
    process = start(_SCRIPT, *flags, signalled=signalled, env=env, cwd=cwd)
    return finish(process, timeout=_TIMEOUT)


def _metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> SimpleNamespace:
    """A run that nothing interrupts, from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("quick")
    result = _run("--quick", "--out", "a/b", cwd=folder)
    assert result.code == 0, result.stderr
    result.out = folder / "a" / "b"
    return result


@pytest.mark.slow
def test_a_quick_run_learns_and_solves_all_it_meets(quick):
    metrics = _metrics(quick.out)
    assert metrics["accuracy"] > 0.85
    assert metrics["solves"] == 3 * 21 * 64 + 4 * 450
    assert metrics["failed_forward"] == 0
    assert metrics["failed_backward"] == 0
    # The tolerance is 1e-6, and what an error in `z` does to the gradient a small
    # multiple of it.
    assert metrics["gradient_error"] < 1e-5
    assert 0 < metrics["spectral_radius"] < 0.95
    assert metrics["history"]["train_loss"][0] is None  # No epoch came before it.
    assert all(np.isfinite(metrics["history"]["loss"]))


@pytest.mark.slow
def test_a_quick_run_says_what_it_did(quick):
    metrics = _metrics(quick.out)
    for name, value in (
        ("held-out accuracy", f"{metrics['accuracy']:.2%}"),
        ("forward steps, mean", f"{metrics['forward_steps_mean']:.2f}"),
        ("forward steps, worst", f"{metrics['forward_steps_worst']}"),
        ("backward steps, mean", f"{metrics['backward_steps_mean']:.2f}"),
        ("backward steps, worst", f"{metrics['backward_steps_worst']}"),
        ("failed forward solves", "0"),
        ("failed backward solves", "0"),
        ("error of the gradient", f"{metrics['gradient_error']:.1e}"),
        ("sha256 of the parameters", metrics["sha256"]),
    ):
        pattern = rf"^{name} +{re.escape(value)}( |$)"
        assert re.search(pattern, quick.stdout, re.MULTILINE), (name, quick.stdout)
    bar = quick.stderr.rstrip().split("\r")[-1]
    text = "epoch 3/3, loss 0.0, accuracy 0.0%, steps 0.0 forward 0.0 back"
    assert re.sub(r"\d+\.\d+", "0.0", bar).startswith(text), bar
    # A log gets a line now and then, not one a step.
    assert quick.stderr.count("\r") < 63


@pytest.mark.slow
def test_a_quick_run_leaves_its_files_and_no_others(quick):
    names = ["checkpoint.eqx", "digits.png", "final.eqx", "metrics.json"]
    assert sorted(os.listdir(quick.out)) == names
    picture = (quick.out / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert 20_000 < len(picture) < 200_000


_IS_POSIX = pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL.")

# Where the next run is killed, and after how many steps the one after it goes on. An
# epoch has 21 steps, and checkpoints are written every 5, and at its end.
_KILLS = (
    # Between the writing and the renaming of the eighth, amid the second epoch.
    (("os", "replace", 8), 25),
    # When two of the 63 steps are left, and one has been done since the checkpoint.
    (("digits_model", "update", 37), 60),
)


@_IS_POSIX
@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_never_had_been(quick, tmp_path):
    path = tmp_path / "checkpoint.eqx"
    flags = ("--quick", "--resume", "--save-every", 5, "--out", tmp_path)
    process = start(_SCRIPT, *flags)
    while process.poll() is None and not path.exists():
        time.sleep(0.001)
    process.kill()
    killed = finish(process, timeout=_TIMEOUT)
    assert killed.code == -signal.SIGKILL, killed.stderr
    assert "There is no checkpoint" in killed.stdout
    num_steps = 0
    for where, next_num_steps in _KILLS:
        killed = _run(*flags, signalled=(int(signal.SIGKILL), *where))
        assert killed.code == -signal.SIGKILL, killed.stderr
        assert f"Going on from {path}, after {num_steps} steps." in killed.stdout
        has_partial = (tmp_path / "checkpoint.eqx.tmp").exists()
        assert has_partial == (where[0] == "os")
        num_steps = next_num_steps
    last = _run(*flags)
    assert last.code == 0, last.stderr
    assert f"Going on from {path}, after {num_steps} steps." in last.stdout
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(quick.out))
    assert (tmp_path / "final.eqx").read_bytes() == (
        quick.out / "final.eqx"
    ).read_bytes()
    metrics, expected = _metrics(tmp_path), _metrics(quick.out)
    assert metrics.pop("seconds") > 0
    assert expected.pop("seconds") > 0
    assert metrics == expected


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """What one run has compiled, the next need not: its environment."""
    names = ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    values = (str(tmp_path_factory.mktemp("cache")), "0.1")
    return {f"JAX_{k}": v for k, v in zip(names, values, strict=True)}


@_IS_POSIX
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_never_had_been(
    quick, tmp_path, cache
):
    path, rng = tmp_path / "checkpoint.eqx", random.Random(0)
    flags = ("--quick", "--resume", "--save-every", 1, "--out", tmp_path)
    delays = [rng.uniform(0, 0.2) for _ in range(2)]
    for delay in delays:
        process = start(_SCRIPT, *flags, env=cache)
        # Until it trains: at the start of the first run it saves as well. From then on
        # every other moment is one of writing.
        inodes = {path.stat().st_ino if path.exists() else None}
        while process.poll() is None and len(inodes) < 3:
            with contextlib.suppress(FileNotFoundError):
                inodes.add(path.stat().st_ino)
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        killed = finish(process, timeout=_TIMEOUT)
        # Or it has come to its end before, on a machine quicker than it should be.
        assert killed.code in (-signal.SIGKILL, 0), (delays, killed.stderr)
    result = _run(*flags, env=cache)
    assert result.code == 0, (delays, result.stderr)
    assert f"Going on from {path}, after " in result.stdout
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(quick.out))
    final = (tmp_path / "final.eqx").read_bytes()
    assert final == (quick.out / "final.eqx").read_bytes(), delays
    metrics, expected = _metrics(tmp_path), _metrics(quick.out)
    assert metrics.pop("seconds") != expected.pop("seconds")
    assert metrics == expected


@_IS_POSIX
@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(
    quick, tmp_path, cache
):
    path = tmp_path / "checkpoint.eqx"
    flags = ("--quick", "--save-every", 5, "--out", tmp_path)
    # The fourth comes after 15 steps. Not all of it fits.
    result = _run(*flags, signalled=(FULL, "checkpoint", "save", 4), env=cache)
    assert result.code == 1
    message = f"digits.py: error: [Errno 27] File too large: '{path}'\n"
    assert result.stderr.endswith(message)
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_size > LARGEST
    result = _run(*flags, "--resume", env=cache)
    assert result.code == 0, result.stderr
    assert f"Going on from {path}, after 10 steps." in result.stdout
    final = (tmp_path / "final.eqx").read_bytes()
    assert final == (quick.out / "final.eqx").read_bytes()


@_IS_POSIX
@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    where = (int(signal.SIGINT), "digits_data", "batches", 1)
    result = _run("--quick", "--out", tmp_path, signalled=where)
    assert result.code == 128 + signal.SIGINT
    assert result.stderr.endswith(
        "Interrupted; --resume goes on from the last checkpoint.\n"
    )
    assert "Traceback" not in result.stderr


def _flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("damaged", (), "is truncated or damaged"),
        ("foreign", (), "is not a checkpoint of this example"),
        ("whole", ("--epochs", 4), "epochs is 3 there and 4 here"),
    ],
)
def test_a_bad_checkpoint_is_named_and_left_alone(quick, tmp_path, kind, flags, words):
    whole = (quick.out / "checkpoint.eqx").read_bytes()
    path = tmp_path / "checkpoint.eqx"
    content = {
        "whole": whole,
        "damaged": _flip_a_bit(whole),
        "foreign": pickle.dumps({"step": 21}),
    }[kind]
    path.write_bytes(content)
    before = path.stat()
    result = _run("--quick", "--resume", "--out", tmp_path, *flags)
    assert result.code == 1
    assert result.stderr.startswith(f"digits.py: error: argument --resume: {path} ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_an_error_at_once(tmp_path):
    path = tmp_path / "checkpoint.eqx"
    path.mkdir()
    result = _run("--quick", "--out", tmp_path)
    assert result.code == 1
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert path.is_dir()


@pytest.fixture(scope="module")
def import_example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPT.parent))
        yield importlib.import_module


def test_an_epoch_shows_every_image_once_with_its_label(import_example):
    labels = np.arange(60, dtype=np.int32)
    images = np.broadcast_to(labels[:, None, None], (60, 8, 8)).astype(np.float32)
    data = import_example("digits_data")
    for epoch in range(3):
        shown = list(data.batches(images, labels, 20, seed=0, epoch=epoch))
        assert len(shown) == 3
        assert sorted(np.concatenate([x for _, x in shown])) == list(labels)
        for batch, batch_labels in shown:
            assert batch.shape == (20, 64)
            assert batch.dtype == np.float32
            middle = batch.reshape(20, 8, 8)[:, 1:-1, 1:-1]  # Shifts reach no further.
            assert np.array_equal(
                np.rint(np.mean(middle, axis=(1, 2))), batch_labels.astype(np.float32)
            )


def test_an_epoch_depends_on_its_number_and_the_seed_alone(import_example):
    batches = import_example("digits_data").batches
    images, labels = np.zeros((60, 8, 8), np.float32), np.arange(60, dtype=np.int32)

    def epoch(**kwargs):
        return [x.tobytes() for b in batches(images, labels, 20, **kwargs) for x in b]

    first = epoch(seed=0, epoch=0)
    assert epoch(seed=0, epoch=0) == first
    for other in (epoch(seed=0, epoch=1), epoch(seed=1, epoch=0)):
        assert not set(other) & set(first)


def test_the_dense_gradient_is_that_of_finite_differences(import_example):
    measure = import_example("digits_measure")
    rng = np.random.default_rng(0)
    shapes = {
        "weight": (5, 5),
        "injection": (5, 3),
        "bias": (5,),
        "readout": (4, 5),
        "readout_bias": (4,),
    }
    arrays = {name: 0.3 * rng.standard_normal(s) for name, s in shapes.items()}
    images, labels = rng.standard_normal((6, 3)), rng.integers(0, 4, 6)

    def loss(p):
        total = 0.0
        for x, label in zip(images, labels, strict=True):
            z = np.zeros(5)
            for _ in range(400):
                z = np.tanh(p["weight"] @ z + p["injection"] @ x + p["bias"])
            logits = p["readout"] @ z + p["readout_bias"]
            total += np.log(np.sum(np.exp(logits))) - logits[label]
        return total / len(labels)

    cell = SimpleNamespace(**{k: arrays[k] for k in ("weight", "injection", "bias")})
    readout = SimpleNamespace(weight=arrays["readout"], bias=arrays["readout_bias"])
    model = SimpleNamespace(layer=SimpleNamespace(cell=cell), readout=readout)
    grads = measure.dense_gradient(model, images, labels)
    step = 1e-5
    for name, grad in zip(shapes, grads, strict=True):
        direction = rng.standard_normal(shapes[name])
        above, below = (
            loss(arrays | {name: arrays[name] + sign * step * direction})
            for sign in (1, -1)
        )
        # Truncation is of order `step**2`, rounding `eps / step`: both near 1e-10.
        difference = (above - below) / (2 * step)
        assert abs(difference - np.sum(grad * direction)) < 1e-8
