"""Run an example as its readers do, and send it a signal at a moment of its own."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace


# In place of a signal: from then on no file can grow past `LARGEST` bytes. It fails in
# the midst of a file as a full disk does, but for the number of the error. What the
# process says must go into a pipe, or that ends there too.
FULL = 0
LARGEST = 1 << 12

# Runs a script and sends it a signal when it calls a function for the n-th time. One
# that lives on dawdles, so that not all steps are made before it can react.
SIGNALLED = f"""
import importlib, os, runpy, signal, sys, time

def strike(number):
    if number != {FULL}:
        os.kill(os.getpid(), number)
        return
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({LARGEST}, hard))

# A shell has its background jobs ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

script, number, module, name, n, *flags = sys.argv[1:]
sys.argv = [script, *flags]
sys.path.insert(0, os.path.dirname(script))
owner = importlib.import_module(module)
original = getattr(owner, name)
num_calls = 0

def counted(*args, **kwargs):
    global num_calls
    num_calls += 1
    if num_calls == int(n):
        strike(int(number))
    if num_calls >= int(n):
        time.sleep(1)
    return original(*args, **kwargs)

setattr(owner, name, counted)
runpy.run_path(script, run_name="__main__")
"""


def environment() -> dict[str, str]:
    """That of a reader: without what the tests set for themselves."""
    kept = {k: v for k, v in os.environ.items() if k[:4] not in ("JAX_", "XLA_")}
    return kept | {"PYTHONUTF8": "1"}


def start(
    script: Path,
    *flags: object,
    signalled: tuple = (),
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """**Arguments:**

    - `signalled`: A signal or `FULL`, a module, a function of it, and at which of its
        calls.
    - `env`: On top of that of a reader.
    """
    driver = ["-c", SIGNALLED] if signalled else []
    return subprocess.Popen(
        [sys.executable, *map(str, (*driver, script, *signalled, *flags))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment() | (env or {}),
        cwd=cwd,
    )


def finish(process: subprocess.Popen[bytes], *, timeout: float) -> SimpleNamespace:
    """Its exit status, and what it wrote."""
    with process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    # Not as text, which would make line feeds of the bar's carriage returns. Nothing
    # comes through the second pipe where both streams go into the first.
    stdout, stderr = stdout.decode(), (stderr or b"").decode()
    return SimpleNamespace(code=process.returncode, stdout=stdout, stderr=stderr)
