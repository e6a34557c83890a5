"""Processes, devices, and how a batch comes to lie on them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


AXIS = "batch"
# A process that says nothing for so many seconds is dead, and JAX then ends the others,
# also out of a collective that waits for it. Unless told otherwise it takes 100.
_HEARTBEAT_TIMEOUT = 20
# How long a process that ends waits for the others, one that ends by an error as well.
# JAX's 300 seconds are too long for that.
_SHUTDOWN_TIMEOUT = 20
_INITIALISATION_TIMEOUT = 120


def join(
    num_devices: int | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    is_distributed: bool,
) -> None:
    """Find the other processes. Before anything that asks for a device.

    **Arguments:**

    - `num_devices`: So many CPU devices in this process, in place of what is there.
    - `coordinator`, `num_processes`, `process_id`: As for `jax.distributed.initialize`.
    - `is_distributed`: Whether JAX is to find these three by itself.
    """
    if num_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    if coordinator is None and not is_distributed:
        return
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method=None if is_distributed else "deactivate",
        initialization_timeout=_INITIALISATION_TIMEOUT,
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
    )


def make_mesh() -> Mesh:
    """All devices of all processes in a row."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def describe(mesh: Mesh) -> str:
    num_devices, num_processes = mesh.size, jax.process_count()
    devices = "device" if num_devices == 1 else "devices"
    processes = "process" if num_processes == 1 else "processes"
    return f"{num_devices} {devices} of {num_processes} {processes}"


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch that the devices of this process hold."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    slices = sharding.addressable_devices_indices_map((size,)).values()
    spans = sorted(index[0].indices(size)[:2] for index in slices if index is not None)
    return np.concatenate([np.arange(*span) for span in spans])


def global_batch(mesh: Mesh, *local: np.ndarray) -> list[jax.Array]:
    """One array over all processes of what each of them has of it."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return [jax.make_array_from_process_local_data(sharding, x) for x in local]
