"""The sharded example, `examples/train_sharded.py`, run as its readers run it.

On one device, on eight of one process, and on four each of two processes, which are
real, on the loopback interface.
"""

import importlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .processes import environment, finish, FULL, SIGNALLED


for _name in ("matplotlib", "optax", "orbax.checkpoint", "sklearn", "tqdm"):
    pytest.importorskip(_name)
fcntl = pytest.importorskip("fcntl", reason="Processes are killed as POSIX does it.")

_SCRIPT = Path(__file__).parents[1] / "examples" / "train_sharded.py"
_NUM_STEPS, _SAVE_EVERY, _SIZE = 12, 5, 64
_FLAGS = ("--batch-size", _SIZE, "--features", 32, "--save-every", _SAVE_EVERY)
_TIMEOUT = 240  # Of one run, in seconds, on a machine that has other work.
# From the death of a process to the end of the other. The heartbeats of the example
# have 20 seconds.
_BOUND = 60


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _start(out: Path, i: int, flags: tuple, signalled: tuple = ()) -> subprocess.Popen:
    with open(f"{out}.{i}.log", "wb") as log:
        return _start_into(log, out, flags, signalled)


def _start_into(
    log: Any, out: Path, flags: tuple, signalled: tuple
) -> subprocess.Popen[bytes]:
    environment_of_run = environment() | {
        # For the time of compilation.
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    driver = ["-c", SIGNALLED] if signalled else []
    command = [*driver, _SCRIPT, *signalled, "--out", out, *_FLAGS, *flags]
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment_of_run,
    )


def _finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[float]]:
    """The exit codes, and when each process was found to have ended."""
    ends: dict[int, float] = {}
    deadline = time.monotonic() + _TIMEOUT
    try:
        while len(ends) < len(processes):
            for i, process in enumerate(processes):
                if i not in ends and process.poll() is not None:
                    ends[i] = time.monotonic()
            assert time.monotonic() < deadline, "A process has not ended."
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    return codes, [ends[i] for i in range(len(processes))]


def _log(out: Path, i: int = 0) -> str:
    return Path(f"{out}.{i}.log").read_text(errors="replace")


def _run_one(out: Path, *flags: object) -> int:
    (code,), _ = _finish([_start(out, 0, ("--steps", _NUM_STEPS, *flags))])
    return code


def _run_pair(out: Path, *flags: object, signalled: dict[int, tuple] | None = None):
    port = _free_port()
    common = ("--steps", _NUM_STEPS, "--devices", 4, "--processes", 2, *flags)
    common = (*common, "--coordinator", f"127.0.0.1:{port}", "--process-id")
    signalled = signalled or {}
    return _finish([_start(out, i, (*common, i), signalled.get(i, ())) for i in (0, 1)])


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], SimpleNamespace]:
    """Make a run, or take it from another worker of pytest that made it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "train_sharded"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], Any]) -> SimpleNamespace:
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = root / f"{name}.json"
            if not done.exists():
                done.write_text(json.dumps(make(root / name)))
            return SimpleNamespace(out=root / name, result=json.loads(done.read_text()))

    return once


@pytest.fixture(scope="module")
def one(once) -> Path:
    run = once("one", lambda out: _run_one(out))
    assert run.result == 0, _log(run.out)
    return run.out


@pytest.fixture(scope="module")
def eight(once) -> Path:
    run = once("eight", lambda out: _run_one(out, "--devices", 8))
    assert run.result == 0, _log(run.out)
    return run.out


@pytest.fixture(scope="module")
def pair(once) -> Path:
    run = once("pair", lambda out: _run_pair(out)[0])
    assert run.result == [0, 0], _log(run.out) + _log(run.out, 1)
    return run.out


@pytest.fixture(scope="module")
def killed(once, pair) -> SimpleNamespace:
    """Two processes, of which the second dies when eight steps have been made."""
    del pair  # It has filled the cache of compiled programs.
    where = (int(signal.SIGKILL), "sharded_data", "local_batch", 9)
    return once("killed", lambda out: _run_pair(out, signalled={1: where}))


def _go_on(out: Path, name: str) -> Path:
    """A copy of a run, to be resumed."""
    copy = out.with_name(name)
    shutil.copytree(out, copy)
    return copy


def _rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _column(out: Path, name: str) -> np.ndarray:
    rows = [row for row in _rows(out) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, _NUM_STEPS + 1))
    return np.array([row[name] for row in rows])


def _parameters(out: Path) -> np.ndarray:
    """All in a row."""
    arrays, path = [], out / "final.eqx"
    with open(path, "rb") as file:
        while file.tell() < path.stat().st_size:
            arrays.append(np.load(file).ravel())
    return np.concatenate(arrays)


def _steps(out: Path) -> list[str]:
    return sorted(os.listdir(out / "checkpoints"))


@pytest.fixture(scope="module")
def import_example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(_SCRIPT.parent))
        yield importlib.import_module


# Other devices sum in another order, and a solve whose residual is near the tolerance
# of 1e-6 may take a step more or less. Neither may move the loss by more than some
# times that tolerance.
_RTOL = 1e-5


@pytest.mark.slow
def test_devices_and_processes_do_not_change_the_loss_curve(one, eight, pair):
    expected = _column(one, "loss")
    assert expected[-1] < 0.8 * expected[0]
    for out, where in (
        (one, "1 device of 1 process"),
        (eight, "8 devices of 1 process"),
        (pair, "8 devices of 2 processes"),
    ):
        assert f"{where}, from the start." in _log(out)
        np.testing.assert_allclose(_column(out, "loss"), expected, rtol=_RTOL)
        assert np.array_equal(_column(out, "accuracy"), _column(one, "accuracy"))
        assert not np.any(_column(out, "failed_forward"))
        assert not np.any(_column(out, "failed_backward"))
        assert np.all(_column(out, "forward_steps") > 3)
        assert np.all(_column(out, "backward_steps_worst") <= 64)
        last = _rows(out)[-1]
        assert last["held_out_failed"] == 0
        assert last["held_out_accuracy"] > 0.5


@pytest.mark.slow
def test_the_loss_curve_is_that_of_a_plain_loop_on_one_device(one, import_example):
    data, model = import_example("digits_data"), import_example("digits_model")
    local_batch = import_example("sharded_data").local_batch
    images, labels, *_ = data.load_data()
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        net = model.Classifier(32, key=jax.random.key(0))
        optimiser = model.make_optimiser(_NUM_STEPS)
        opt_state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))
        losses = []
        for step in range(3):
            rows = np.arange(_SIZE)
            batch = local_batch(
                images, labels, size=_SIZE, seed=0, step=step, rows=rows
            )
            grads, aux = model.gradients(net, *batch)
            losses.append(aux["loss"].item())
            net, opt_state = model.update(net, opt_state, grads, optimiser)
    np.testing.assert_allclose(_column(one, "loss")[:3], losses, rtol=_RTOL)


@pytest.mark.slow
def test_only_the_first_process_speaks(pair):
    first, second = _log(pair), _log(pair, 1)
    for words in ("held-out accuracy", "failed forward solves", "loss 1.", "accuracy"):
        assert words in first
        assert words not in second
    names = ["checkpoints", "final.eqx", "metrics.jsonl", "train_sharded.png"]
    assert sorted(os.listdir(pair)) == names
    picture = (pair / "train_sharded.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other(killed):
    codes, ends = killed.result
    assert codes[1] == -signal.SIGKILL, _log(killed.out, 1)
    assert codes[0] not in (0, -signal.SIGKILL), _log(killed.out)
    assert 0 <= ends[0] - ends[1] < _BOUND
    assert not (killed.out / "final.eqx").exists()
    assert _steps(killed.out) == ["5"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_never_had_been(killed, pair):
    out = _go_on(killed.out, "again")
    # The process that coordinates, when of the next checkpoint the arrays are in their
    # place and the header is not.
    where = (int(signal.SIGKILL), "os", "rename", 2)
    codes, ends = _run_pair(out, "--resume", signalled={0: where})
    assert "8 devices of 2 processes, going on after 5 steps." in _log(out)
    assert codes[0] == -signal.SIGKILL, _log(out)
    assert codes[1] not in (0, -signal.SIGKILL), _log(out, 1)
    assert 0 <= ends[1] - ends[0] < _BOUND
    assert _steps(out) == ["10.orbax-checkpoint-tmp", "5"]
    # A scheduler tells one process to end: both save, at the same step, and end.
    where = (int(signal.SIGTERM), "sharded_data", "local_batch", 2)
    codes, _ = _run_pair(out, "--resume", signalled={1: where})
    assert codes == 2 * [128 + signal.SIGTERM], _log(out) + _log(out, 1)
    assert "8 devices of 2 processes, going on after 5 steps." in _log(out)
    last = _rows(out)[-1]["step"]
    assert last > 6
    assert f"Told to end, after {last} steps" in _log(out)
    codes, _ = _run_pair(out, "--resume")
    assert codes == [0, 0], _log(out) + _log(out, 1)
    assert f"8 devices of 2 processes, going on after {last} steps." in _log(out)
    assert (out / "final.eqx").read_bytes() == (pair / "final.eqx").read_bytes()
    assert _rows(out) == _rows(pair)
    assert _steps(out)[-1] == "12"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_never_had_been(one):
    out, rng = one.with_name("random"), random.Random(0)
    flags = ("--steps", _NUM_STEPS, "--resume", "--save-every", 1)
    folder, delays = out / "checkpoints", [rng.uniform(0, 1) for _ in range(2)]
    for delay in delays:
        process = _start(out, 0, flags)
        # Until it saves, which takes longer than all else does. Orbax first removes
        # what a killed run has left.
        before = set(os.listdir(folder)) if folder.exists() else set()
        while process.poll() is None:
            if folder.exists() and not set(os.listdir(folder)) <= before:
                break
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        # Or it has come to its end before.
        assert process.wait() in (-signal.SIGKILL, 0), (delays, _log(out))
    assert _run_one(out, *flags) == 0, (delays, _log(out))
    assert (out / "final.eqx").read_bytes() == (one / "final.eqx").read_bytes(), delays
    assert _rows(out) == _rows(one)
    assert not any("tmp" in name for name in _steps(out))


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_space(one):
    out = one.with_name("full")
    # In the second checkpoint, of the tenth step, the arrays do not fit.
    full = (FULL, "sharded_checkpoint", "save", 2)
    flags = ("--steps", _NUM_STEPS)
    run = finish(_start_into(subprocess.PIPE, out, flags, full), timeout=_TIMEOUT)
    assert run.code == 1
    path = out / "checkpoints" / "10"
    # Before it Orbax has its say, and TensorStore's threads may still have theirs.
    message = f"train_sharded.py: error: {path} cannot be written; "
    assert message in run.stdout
    assert "File too large" in run.stdout.split(message)[1]
    assert "5" in _steps(out)
    assert "10" not in _steps(out)
    assert _run_one(out, "--resume") == 0, _log(out)
    assert "going on after 5 steps." in _log(out)
    assert (out / "final.eqx").read_bytes() == (one / "final.eqx").read_bytes()
    assert _rows(out) == _rows(one)
    assert _steps(out) == ["10", "12"]


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(killed, one, pair):
    out = _go_on(killed.out, "elsewhere")
    assert _run_one(out, "--resume") == 0, _log(out)
    assert "1 device of 1 process, going on after 5 steps." in _log(out)
    np.testing.assert_allclose(_column(out, "loss"), _column(one, "loss"), rtol=_RTOL)
    # Adam divides by the size of the gradient, also where that is little but rounding,
    # and moves a parameter by 1e-2 a step at most. This is a thousandth of one step.
    parameters = _parameters(out)
    for other in (one, pair):
        assert np.max(np.abs(_parameters(other) - parameters)) < 1e-5


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named_and_left_alone(killed):
    out = _go_on(killed.out, "truncated")
    path = out / "checkpoints" / "5"
    largest = max(path.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    metrics = (out / "metrics.jsonl").read_bytes()
    assert _run_one(out, "--resume") == 1
    assert f"error: argument --resume: {path} is damaged" in _log(out)
    assert largest.read_bytes() == content[: len(content) // 2]
    assert (out / "metrics.jsonl").read_bytes() == metrics


def _tree() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "weight": rng.standard_normal((16, 16)).astype(np.float32),
        "count": np.array(7, np.int32),
    }


def _placed(tree: dict[str, np.ndarray], num_devices: int):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("batch",))
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree), sharding


@pytest.fixture
def saved(import_example, tmp_path):
    """The module and a folder with the checkpoint of step 3, from eight devices."""
    module = import_example("sharded_checkpoint")
    with module.make_manager(tmp_path / "saved") as manager:
        module.save(manager, 3, _placed(_tree(), 8)[0], {"seed": 0})
    return module, tmp_path / "saved"


def _restore(module, folder: Path, config: dict[str, Any]):
    like, sharding = _placed(jax.tree.map(np.zeros_like, _tree()), 2)
    with module.make_manager(folder) as manager:
        tree, step = module.restore(manager, like, config, sharding)
    assert step == 3
    assert all(x.sharding == sharding for x in tree.values())
    return tree


def test_a_checkpoint_is_read_on_other_devices(saved):
    module, folder = saved
    tree = _restore(module, folder, {"seed": 0})
    assert all(np.array_equal(tree[k], v) for k, v in _tree().items())


def test_a_checkpoint_of_another_configuration_says_so(saved):
    module, folder = saved
    with pytest.raises(module.CheckpointError, match="seed is 0 there and 1 here"):
        _restore(module, folder, {"seed": 1})


# Damages each file of a checkpoint of step 3, one at a time: truncates it in the
# middle, and flips a bit at one of five places. Prints what came of it. In a process of
# its own: Orbax gives up on the first array that it cannot read, and what TensorStore
# then has to tell of the others would come to light in some later test.
_DAMAGE = """
import collections, json, logging, pathlib, shutil, sys

sys.path.insert(0, sys.argv[1])
import jax
import numpy as np
import sharded_checkpoint as module
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logging.disable()
folder, copy = map(pathlib.Path, sys.argv[2:])
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec())

def restore():
    like = {"weight": np.zeros((16, 16), np.float32), "count": np.zeros((), np.int32)}
    like = jax.tree.map(lambda x: jax.device_put(x, sharding), like)
    with module.make_manager(copy) as manager:
        return module.restore(manager, like, {"seed": 0}, sharding)

def damaged(data):
    yield data[: len(data) // 2]
    for k in range(1, 6):
        i = k * len(data) // 6
        yield data[:i] + bytes([data[i] ^ (1 << k)]) + data[i + 1 :]

shutil.copytree(folder, copy)
expected, _ = restore()
counts = collections.Counter()
for path in [p for p in copy.rglob("*") if p.is_file()]:
    whole = path.read_bytes()
    for content in damaged(whole):
        path.write_bytes(content)
        try:
            tree, _ = restore()
            same = all(np.array_equal(tree[k], x) for k, x in expected.items())
            result = "the same" if same else "another"
        except module.CheckpointError as error:
            result = "an error" if str(copy / "3") in str(error) else "no path"
        counts[result] += 1
    path.write_bytes(whole)
print(json.dumps(counts))
"""


def test_whatever_is_damaged_no_other_arrays_are_restored(saved, tmp_path):
    _, folder = saved
    arguments = [_SCRIPT.parent, folder, tmp_path / "copy"]
    process = subprocess.run(
        [sys.executable, "-c", _DAMAGE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        timeout=_TIMEOUT,
        check=True,
    )
    counts = json.loads(process.stdout)
    # Of some files nothing is needed.
    assert counts.keys() == {"the same", "an error"}
    assert counts["an error"] > 20


def test_a_batch_does_not_depend_on_who_makes_which_rows(import_example):
    local_batch = import_example("sharded_data").local_batch
    labels = np.arange(60, dtype=np.int32)
    images = np.broadcast_to(labels[:, None, None], (60, 8, 8)).astype(np.float32)
    seen = []
    for step in range(6):  # Two epochs of three batches.
        make = lambda rows, seed=0, step=step: local_batch(
            images, labels, size=20, seed=seed, step=step, rows=np.array(rows)
        )
        whole, chosen = make(range(20))
        parts = [make(rows) for rows in ([0, 1, 2], [3], range(4, 20))]
        assert np.array_equal(whole, np.concatenate([x for x, _ in parts]))
        assert np.array_equal(chosen, np.concatenate([y for _, y in parts]))
        assert np.array_equal(np.rint(np.mean(whole, axis=1)), chosen)
        assert not np.array_equal(whole, make(range(20), seed=1)[0])
        noise = whole - chosen[:, None]
        assert abs(np.std(noise) - 0.05) < 0.005
        assert len({x.tobytes() for x in noise}) == 20
        seen.append(chosen)
    for epoch in (seen[:3], seen[3:]):
        assert sorted(np.concatenate(epoch)) == list(labels)
    assert not np.array_equal(seen[0], seen[3])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--processes", "2"), "go together"),
        (("--distributed", "--coordinator", "a:1"), "go together"),
        (("--devices", "0"), "expected an integer from 1"),
        (("--out", "here"), "there are checkpoints in here"),
    ],
)
def test_wrong_flags_are_errors_at_once(
    import_example, tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "checkpoints" / "5").mkdir(parents=True)
    parse_args = import_example("train_sharded").parse_args
    monkeypatch.setattr(sys, "argv", ["train_sharded.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        parse_args()
    assert words in capsys.readouterr().err
