"""The checkpoints of the examples, `examples/checkpoint.py`."""

import hashlib
import importlib.util
import io
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest


_FILE = Path(__file__).parents[1] / "examples" / "checkpoint.py"
_CONFIG = {"seed": 0, "rate": 1e-06, "name": "digits"}


def _import() -> Any:
    spec = importlib.util.spec_from_file_location("checkpoint", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checkpoint = _import()


def _tree(offset=0) -> dict[str, Any]:
    awkward = [jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-45, 5e-324, 0.1 + offset]
    return {
        "float32": jnp.array(awkward, jnp.float32),
        "float64": jnp.array(awkward, jnp.float64),
        "bool": jnp.array([[True], [False]]),
        "numpy": np.array(awkward),
        "empty": jnp.zeros((0, 3), jnp.float32),
        "scalars": (0.1 + offset, 2**40 + offset, True),
    }


def _bits(tree: Any) -> list[Any]:
    return [
        (type(x), np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes())
        for x in jtu.tree_leaves(tree)
    ]


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "checkpoint.eqx"
    checkpoint.save(path, _tree(), _CONFIG)
    return path


def _assert_refused(path: Path, words: str = "", like=None, config=None) -> None:
    """The error names the file, says the words, and the file stays as it is."""
    before, status = path.read_bytes(), path.stat()
    with pytest.raises(checkpoint.CheckpointError) as info:
        checkpoint.load(path, _tree() if like is None else like, config or _CONFIG)
    assert str(path) in str(info.value)
    assert words in str(info.value)
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert os.listdir(path.parent) == [path.name]


def _write_content(path: Path, payload: bytes, **header) -> None:
    """A file that is whole as far as its checksum goes."""
    fields = {"format": "equilax-example-checkpoint", "version": 1, "config": _CONFIG}
    content = json.dumps(fields | header).encode() + b"\n" + payload
    path.write_bytes(content + hashlib.sha256(content).digest())


def test_what_is_loaded_is_what_was_saved_to_the_bit(saved):
    loaded = checkpoint.load(saved, _tree(offset=1), _CONFIG)
    assert _bits(loaded) == _bits(_tree())
    assert jtu.tree_structure(loaded) == jtu.tree_structure(_tree())


def test_a_python_number_keeps_its_bits_without_float64(tmp_path):
    with jax.enable_x64(False):
        checkpoint.save(tmp_path / "file", (0.1, 2**40 + 1), {})
        assert checkpoint.load(tmp_path / "file", (0.0, 0), {}) == (0.1, 2**40 + 1)


def test_the_same_content_makes_the_same_file(saved, tmp_path):
    checkpoint.save(tmp_path / "again", _tree(), _CONFIG)
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_saving_again_replaces(saved):
    checkpoint.save(saved, _tree(offset=1), _CONFIG)
    assert _bits(checkpoint.load(saved, _tree(), _CONFIG)) == _bits(_tree(offset=1))
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_cut_off_anywhere_is_refused(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        _assert_refused(saved)


def test_a_file_added_to_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    _assert_refused(saved, "checksum")


def test_a_bit_flipped_anywhere_is_refused(saved):
    whole = saved.read_bytes()
    header_length = whole.index(b"\n") + 1
    for i in range(len(whole)):
        for bit in range(8) if i < header_length else [i % 8]:
            changed = bytearray(whole)
            changed[i] ^= 1 << bit
            saved.write_bytes(changed)
            _assert_refused(saved)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_CONFIG | {"seed": 1}, "seed is 0 there and 1 here"),
        (_CONFIG | {"rate": 2e-06}, "rate is 1e-06 there and 2e-06 here"),
        (_CONFIG | {"more": 3}, "more is None there and 3 here"),
        ({"seed": 0, "rate": 1e-06}, "name is 'digits' there and None here"),
    ],
)
def test_another_configuration_is_refused_and_said(saved, config, words):
    _assert_refused(saved, words, config=config)


class _Fires:
    """Unpickled, it makes a folder."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


_FOREIGN = {
    "empty": b"",
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0",
    "json": json.dumps({"format": "something else", "version": 1}, indent=1).encode(),
    "json_line": json.dumps(_CONFIG).encode() + b"\n",
    "json_array": b'["equilax-example-checkpoint", 1]\n',
    "json_deep": b"[" * 100_000,
    "json_long_number": b"1" * 100_000,
    "text": "Gruß\n".encode("latin-1"),
    "zeros": bytes(1_000_000),
    "npy": _npy(np.zeros(3)),
    "npz": _npz(np.zeros(3)),
}


@pytest.mark.parametrize("kind", _FOREIGN)
def test_another_kind_of_file_is_refused(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(_FOREIGN[kind])
    _assert_refused(path, "is not a checkpoint of this example")


def test_a_folder_is_refused(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"folder cannot be read"):
        checkpoint.load(path, _tree(), _CONFIG)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"none cannot be read"):
        checkpoint.load(tmp_path / "none", _tree(), _CONFIG)


def test_a_version_from_the_future_is_refused_and_said(tmp_path):
    path = tmp_path / "file"
    _write_content(path, checkpoint.serialise(_tree()), version=2)
    _assert_refused(path, "has version 2 of the format; this example reads version 1")


@pytest.mark.parametrize("is_array", [True, False], ids=["object_array", "pickle"])
@pytest.mark.parametrize("is_bare", [True, False], ids=["bare", "in_a_checkpoint"])
@pytest.mark.parametrize(
    "like", [jnp.zeros(1), np.zeros(1), 0.0], ids=lambda x: type(x)
)
def test_a_pickle_is_refused_and_does_not_run(tmp_path, is_array, is_bare, like):
    folder, trap = tmp_path / "folder", tmp_path / "trap"
    folder.mkdir()
    path, fires = folder / "file", _Fires(trap)
    payload = _npy(np.array([fires], object)) if is_array else pickle.dumps(fires)
    if is_bare:
        path.write_bytes(payload)
    else:
        _write_content(path, payload)
    _assert_refused(path, "" if is_bare else "pickle", like=like)
    assert not trap.exists()
    # The trap works.
    stream = io.BytesIO(payload)
    np.load(stream, allow_pickle=True) if is_array else pickle.load(stream)
    assert trap.exists()


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (_npy(np.zeros(4, np.float32)), "shape"),
        (_npy(np.zeros(3, np.float64)), "dtype"),
        (_npz(np.zeros(3, np.float32)), "type"),
        (_npy(np.zeros(3, np.float32))[:-1], ""),
        (b"", ""),
        (_npy(np.zeros(3, np.float32)) + b"\0", "more than this example saves"),
    ],
    ids=["shape", "dtype", "archive", "short", "nothing", "long"],
)
def test_another_content_under_a_good_checksum_is_refused(tmp_path, payload, words):
    path = tmp_path / "file"
    _write_content(path, payload)
    _assert_refused(path, words, like=jnp.zeros(3, jnp.float32))


@pytest.mark.parametrize("config", [None, 1, [["seed", 0]]])
def test_a_header_without_configuration_is_refused(tmp_path, config):
    path = tmp_path / "file"
    _write_content(path, checkpoint.serialise(_tree()), config=config)
    _assert_refused(path, "no configuration")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_whole(saved, monkeypatch, name):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, name, fail)
        with pytest.raises(OSError, match="No space left") as info:
            checkpoint.save(saved, _tree(offset=1), _CONFIG)
    assert str(saved) in str(info.value)
    assert _bits(checkpoint.load(saved, _tree(), _CONFIG)) == _bits(_tree())
    assert os.listdir(saved.parent) == [saved.name]  # The space is free again.
    checkpoint.save(saved, _tree(offset=1), _CONFIG)
    assert _bits(checkpoint.load(saved, _tree(), _CONFIG)) == _bits(_tree(offset=1))
    assert os.listdir(saved.parent) == [saved.name]


_KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import checkpoint
setattr(os, sys.argv[3], lambda *args: os.kill(os.getpid(), signal.SIGKILL))
checkpoint.save(pathlib.Path(sys.argv[2]), [0.0] * 1000, {})
"""


@pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL.")
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_whole(saved, name):
    arguments = (str(_FILE.parent), str(saved), name)
    result = subprocess.run([sys.executable, "-c", _KILLED, *arguments], timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert os.listdir(saved.parent) != [saved.name]  # It had begun.
    assert _bits(checkpoint.load(saved, _tree(), _CONFIG)) == _bits(_tree())
    checkpoint.save(saved, _tree(offset=1), _CONFIG)
    assert _bits(checkpoint.load(saved, _tree(), _CONFIG)) == _bits(_tree(offset=1))
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.skipif(os.name != "posix", reason="A directory cannot be opened.")
def test_the_content_is_flushed_before_the_name_and_the_name_after(saved, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def log_fsync(descriptor):
        status = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        calls.append("folder" if is_folder else f"file of {status.st_size} bytes")
        fsync(descriptor)

    def log_replace(old, new):
        calls.append("replace")
        replace(old, new)

    monkeypatch.setattr(checkpoint.os, "fsync", log_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", log_replace)
    checkpoint.save(saved, _tree(), _CONFIG)
    num_bytes = len(saved.read_bytes())
    assert calls == [f"file of {num_bytes} bytes", "replace", "folder"]
