"""Kills at random moments, full disks and closed folders: `examples/checkpoint.py`."""

import argparse
import contextlib
import errno
import hashlib
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest


pytest.importorskip("optax")
pytest.importorskip("tqdm")
resource = pytest.importorskip("resource", reason="Limits are set as POSIX does it.")

_EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def import_example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_EXAMPLES))
        yield importlib.import_module


@pytest.fixture(scope="module")
def checkpoint(import_example):
    return import_example("checkpoint")


_NUM_KILLS = 20

# Replaces a file again and again, and prints which number is in it after each time.
# Without Equinox, which takes longer to import than all else takes.
_WRITER = """
import hashlib, itertools, pathlib, sys, types

sys.path.insert(0, sys.argv[1])
sys.modules["equinox"] = types.ModuleType("equinox")
import checkpoint

path = pathlib.Path(sys.argv[2])
for n in itertools.count(int(sys.argv[3])):
    content = n.to_bytes(8, "little") * 50_000
    checkpoint.replace_file(path, content, hashlib.sha256(content).digest())
    print(n, flush=True)
"""


def test_a_kill_at_any_moment_leaves_the_last_file_or_the_next(tmp_path):
    path, rng = tmp_path / "file", random.Random(0)
    last, num_amid = 0, 0
    for _ in range(_NUM_KILLS):
        command = [sys.executable, "-c", _WRITER, str(_EXAMPLES), path, str(last + 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            lines = [first, *process.stdout]
        assert process.returncode == -signal.SIGKILL
        data = path.read_bytes()
        content, digest = data[:-32], data[-32:]
        assert hashlib.sha256(content).digest() == digest
        last = int(lines[-1])
        number = int.from_bytes(content[:8], "little")
        assert number in (last, last + 1)
        last = number
        num_amid += (tmp_path / "file.tmp").exists()
        assert set(os.listdir(tmp_path)) <= {"file", "file.tmp"}
    assert num_amid > _NUM_KILLS / 4


@contextlib.contextmanager
def _limited(path: Path):
    """No file grows past 4 KiB: what comes next is written in part."""
    del path
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _full(path: Path):
    """The file is on a device that is full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("Only Linux has a device that is always full.")
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")
    yield errno.ENOSPC


@pytest.mark.parametrize("fault", [_limited, _full])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(checkpoint, tmp_path, fault):
    path = tmp_path / "file"
    tree = {"weight": np.arange(1e4), "step": 3}
    checkpoint.save(path, tree, {"seed": 0})
    before = path.read_bytes()
    assert len(before) > 1 << 14
    for _ in range(3):
        with fault(path) as code, pytest.raises(OSError, match="file'") as info:
            checkpoint.save(path, {"weight": tree["weight"] + 1, "step": 4}, {})
        assert info.value.errno == code
        assert str(info.value) == f"[Errno {code}] {os.strerror(code)}: '{path}'"
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["file"]
    loaded = checkpoint.load(path, tree, {"seed": 0})
    assert np.array_equal(loaded["weight"], tree["weight"])
    checkpoint.save(path, {**tree, "step": 4}, {"seed": 0})
    assert checkpoint.load(path, tree, {"seed": 0})["step"] == 4


def test_a_folder_that_is_gone_or_none_is_named(checkpoint, tmp_path):
    (tmp_path / "text").write_text("no folder")
    for name, error in (("gone", FileNotFoundError), ("text", NotADirectoryError)):
        path = tmp_path / name / "file"
        with pytest.raises(error, match=str(path)):
            checkpoint.save(path, [0.0], {})
        with pytest.raises(checkpoint.CheckpointError, match=f"{path} cannot be read"):
            checkpoint.load(path, [0.0], {})
    assert os.listdir(tmp_path) == ["text"]
    assert (tmp_path / "text").read_text() == "no folder"


def _skip_if(is_allowed: bool) -> None:
    if is_allowed:
        pytest.skip("All is open to root.")


def test_a_folder_that_may_not_be_written_to_is_named(checkpoint, tmp_path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    checkpoint.save(path, [1.0], {})
    path.parent.chmod(0o500)
    try:
        _skip_if(os.access(path.parent, os.W_OK))
        with pytest.raises(PermissionError, match=str(path)):
            checkpoint.save(path, [2.0], {})
        assert checkpoint.load(path, [0.0], {}) == [1.0]
        assert os.listdir(path.parent) == ["file"]
    finally:
        path.parent.chmod(0o700)


def test_a_file_that_may_not_be_read_is_named(checkpoint, tmp_path):
    path = tmp_path / "file"
    checkpoint.save(path, [1.0], {})
    path.chmod(0)
    _skip_if(os.access(path, os.R_OK))
    with pytest.raises(checkpoint.CheckpointError, match=r"file cannot be read: Perm"):
        checkpoint.load(path, [0.0], {})


class _Stopped(BaseException):
    """As good as a kill: nothing catches it, and no file is written after it."""


def _train(import_example, out: Path, stop: int | None, save_every: int):
    """The training of `training.py`, stopped in a step, all else as in the examples."""
    training, optax = import_example("training"), importlib.import_module("optax")
    args = argparse.Namespace(out=out, resume=True)
    start = {"weight": np.linspace(0.1, 0.9, 7, dtype=np.float32)}
    run = training.start_run(start, optax.trace(0.9), num_steps=23, names=["loss"])
    run, save = training.checkpoints(args, run, {"seed": 0}, name="checkpoint")
    num_calls = 0

    def step(model, opt_state, step):
        nonlocal num_calls
        num_calls += 1
        if num_calls == stop:
            raise _Stopped
        trace = np.float32(0.9) * opt_state.trace["weight"] + model["weight"] ** 2
        weight = (np.float32(1.7) * model["weight"] + np.float32(0.01) * step) % 1
        loss = float(np.sum(weight)) + float(np.sum(trace))
        state = opt_state._replace(trace={"weight": trace})
        return {"weight": weight}, state, {"loss": loss}

    return training.train(run, step, num_steps=23, save=save, save_every=save_every)


def test_a_training_stopped_at_random_steps_ends_with_the_same_bits(
    import_example, tmp_path
):
    bits = lambda run: (
        run.step,
        run.model["weight"].tobytes(),
        np.asarray(run.opt_state.trace["weight"]).tobytes(),
        run.history["loss"].tobytes(),
    )
    out = tmp_path / "whole"
    out.mkdir()
    expected = bits(_train(import_example, out, None, 23))
    assert expected[0] == 23
    for seed in range(12):
        rng, out = random.Random(seed), tmp_path / str(seed)
        out.mkdir()
        for _ in range(rng.randint(1, 5)):
            with contextlib.suppress(_Stopped):
                _train(import_example, out, rng.randint(1, 9), rng.randint(1, 6))
        assert bits(_train(import_example, out, None, 4)) == expected
