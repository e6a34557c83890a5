"""The one place that knows platforms, and chooses between kernel and reference."""

from collections.abc import Callable, Mapping
from typing import Any, get_args, Literal, NamedTuple, TypeAlias

import jax
from jax import lax


Implementation: TypeAlias = Literal["reference", "tpu", "triton"]

_PLATFORMS = {"tpu": "tpu", "triton": "cuda"}


class Kernel(NamedTuple):
    """One backend's: `reason` says why it does not take these arrays, if it doesn't."""

    run: Callable[..., Any]
    reason: str | None


def check_implementation(implementation: Implementation | None) -> None:
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"`implementation` must be None or one of {known}; got {implementation!r}."
        )


def _describe(arrays: Any) -> str:
    arrays = [x for x in jax.tree.leaves(arrays) if x.ndim > 0]
    shapes = (f"{x.dtype}{list(x.shape)}" for x in arrays)
    return ", ".join(shapes)


def dispatch(
    *arrays: Any,
    reference: Callable[..., Any],
    kernels: Mapping[str, Kernel],
    implementation: Implementation | None,
) -> Any:
    """Run `reference` or one of `kernels` on `arrays`.

    `None` takes the kernel of the platform that the program is lowered for, if it has
    one that takes these arrays. What is compiled holds no trace of the others.
    """
    if implementation == "reference":
        return reference(*arrays)
    if implementation is not None:
        kernel = kernels[implementation]
        if kernel.reason is not None:
            raise ValueError(
                f"`implementation={implementation!r}` does not take "
                f"{_describe(arrays)}: {kernel.reason}."
            )
        return kernel.run(*arrays)
    able = {_PLATFORMS[k]: v.run for k, v in kernels.items() if v.reason is None}
    return lax.platform_dependent(*arrays, default=reference, **able)
