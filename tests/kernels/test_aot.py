"""Every kernel, compiled for devices that nobody has at hand, and what it became."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from equilax_kernels.affine_fixed_point import tpu_plan


# Target: the package that compiles for it, the flags of XLA, double precision or not.
_TARGETS = {
    "v5e": ("libtpu", "", "0"),
    "v6e": ("libtpu", "", "1"),
    # There is no device to tune on, and a register that spills is an error.
    "h100": (
        "jax_cuda12_plugin",
        "--xla_gpu_autotune_level=0 "
        "--xla_gpu_fail_ptx_compilation_on_register_spilling=true",
        "1",
    ),
}


# The compilers come as plugins of JAX, which have their say in every program: an
# environment of their own keeps them out of all others.
_PYTHON = os.environ.get("EQUILAX_COMPILERS", sys.executable)


def _need(package: str) -> None:
    look = (
        f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    )
    if subprocess.run([_PYTHON, "-c", look]).returncode != 0:
        message = f"{package} is not installed: `pip install --group kernels` has it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def environment(target: str) -> dict[str, str]:
    """What a program that compiles for `target` must find in its environment."""
    _, flags, is_double = _TARGETS[target]
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_X64": is_double,
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "XLA_FLAGS": flags,
    }


def _compiled(target: str) -> list[dict]:
    _need(_TARGETS[target][0])
    done = subprocess.run(
        [_PYTHON, "-m", "tests.kernels.aot", target],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment(target),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


def _name(target: str) -> str:
    return "__gpu$xla.gpu.triton" if target == "h100" else "tpu_custom_call"


def _check_layer(target: str, case: dict) -> None:
    """A layer, forward and backward."""
    is_divided = case["num_devices"] > 1
    # No compiler can divide a kernel of Mosaic's, and so there is none.
    if target != "h100" and is_divided and not case["by_hand"]:
        assert _name(target) not in case["kernels"], case
        assert case["loops"] > 0, case
        return
    # The gradient of the weights is a sum over devices.
    assert case["collectives"] == ["all-reduce"] * is_divided, case
    assert case["kernels"].count(_name(target)) == 2, case
    # The fallback of the adjoint is there, behind a branch.
    is_alone = case["linear_solver"] == "FixedPointLinearSolver"
    assert (case["loops"] == 0) == is_alone, case
    assert (case["branches"] == 0) == is_alone, case


@pytest.mark.slow
@pytest.mark.parametrize("target", list(_TARGETS))
def test_each_kernel_compiles_and_is_all_there_is(target):
    found = _compiled(target)
    for case in found:
        assert "error" not in case, case
    layers = [case for case in found if "layer" in case]
    assert len(layers) == 4
    for case in layers:
        _check_layer(target, case)
    kernels = [case for case in found if "spec" in case]
    assert len(kernels) > 10
    assert {case["num_devices"] for case in kernels} == {1, 4}
    for case in kernels:
        assert case["kernels"] == [_name(target)], case
        # No loop of XLA's, no choice at run time, nothing between devices, and no pass
        # over the state before or after the kernel.
        assert (case["loops"], case["branches"]) == (0, 0), case
        assert (case["collectives"], case["moves"]) == ([], []), case
        if target != "h100":
            spec = case["spec"]
            estimate = tpu_plan.vmem_bytes(
                spec["rows"] // case["num_devices"],
                spec["d"],
                jnp.dtype(spec["dtype"]),
                is_scaled=spec["is_scaled"],
                history_length=spec["history_length"],
            )
            assert 0 < case["vmem"][0] <= estimate, case
