"""Run an example as its readers do, and send it a signal at a moment of its own."""

import os


# Runs a script and sends it a signal when it calls a function for the n-th time. One
# that lives on dawdles, so that not all steps are made before it can react.
SIGNALLED = """
import importlib, os, runpy, signal, sys, time

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
        os.kill(os.getpid(), int(number))
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
