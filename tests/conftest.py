import os
import zlib
from importlib import metadata


# On whatever machine: eight devices are asked for below.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, of programs that run once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    # Those of old compile in half the time. Later versions have the new ones alone.
    + " --xla_cpu_use_fusion_emitters=false"
    * metadata.version("jaxlib").startswith("0.10."),
)

import equinox.internal as eqxi
import jax
import pytest


# The new ones, for a test that hangs on how they round.
_HAS_OLD = metadata.version("jaxlib").startswith("0.10.")
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_OLD else {}

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey(request):
    """Fresh keys, the same ones in every run of the same test."""
    return eqxi.GetKey(seed=zlib.crc32(request.node.nodeid.encode()) >> 1)


_num_tests = 0


def pytest_runtest_teardown(item):
    """Let go of compiled programs, which a process can map only so many of."""
    del item
    global _num_tests
    _num_tests += 1
    if _num_tests % 60 == 0:
        jax.clear_caches()
