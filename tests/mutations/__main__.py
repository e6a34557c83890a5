"""`python -m tests.mutations [WORD ...]`: all, or those with a word in their names.

`--trust` takes it for known that the tests pass without a fault.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from . import ALL
from .mutation import Mutation


_ROOT = Path(__file__).parents[2]
_FOLDERS = ("src", "kernels", "tests", "examples", "bench")
_LIMIT = 300


def _run(tree: Path, tests: tuple[str, ...]) -> int:
    """The exit code of pytest there."""
    path = os.pathsep.join(str(tree / folder) for folder in ("src", "kernels"))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *tests],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        timeout=_LIMIT,
    ).returncode


def _verdict(tree: Path, mutation: Mutation) -> str:
    path = tree / mutation.path
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"STALE: its text stands {text.count(mutation.old)} times in the file"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        code = _run(tree, mutation.tests)
    except subprocess.TimeoutExpired:
        return "found: the tests hang"
    finally:
        path.write_text(text)
    if code == 1 or code < 0:
        return "found" if code == 1 else f"found: the tests end with {code}"
    return "SURVIVED" if code == 0 else f"BROKEN: pytest ended with {code}"


def main(words: list[str], trust: bool) -> int:
    chosen = [m for m in ALL if not words or any(w in m.name for w in words)]
    num_bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in _FOLDERS:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_ROOT / name, tree / name, ignore=ignore)
        shutil.copy(_ROOT / "pyproject.toml", tree)
        # Tests that fail by themselves would find anything.
        for tests in () if trust else sorted({m.tests for m in chosen}):
            if _run(tree, tests) != 0:
                tqdm.write(f"{' '.join(tests)}: fails without a fault")
                num_bad += 1
        for mutation in tqdm(chosen):
            verdict = _verdict(tree, mutation)
            num_bad += not verdict.startswith("found")
            tqdm.write(f"{mutation.name}: {verdict}")
    tqdm.write(f"{len(chosen)} faults, {num_bad} not found")
    return min(num_bad, 1)


if __name__ == "__main__":
    flags = {word for word in sys.argv[1:] if word.startswith("-")}
    sys.exit(main(sorted({*sys.argv[1:]} - flags), "--trust" in flags))
