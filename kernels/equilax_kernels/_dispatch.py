"""The one place that knows platforms, and chooses between kernel and reference."""

from collections.abc import Callable, Mapping
from typing import get_args, Literal, TypeAlias, TypeVar

from jax import lax


Implementation: TypeAlias = Literal["reference", "tpu", "triton"]

_PLATFORMS = {"tpu": "tpu", "triton": "cuda"}
_T = TypeVar("_T")


def check_implementation(implementation: Implementation | None) -> None:
    known = get_args(Implementation)
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"`implementation` must be None or one of {known}; got {implementation!r}."
        )


def on_platform(
    reference: Callable[[], _T], kernels: Mapping[str, Callable[[], _T]]
) -> _T:
    """Call the one of `kernels` for the platform that the program is lowered for.

    What is compiled holds no trace of the others.

    **Arguments:**

    - `reference`: What is called where there is none.
    - `kernels`: By implementation, `"tpu"` or `"triton"`. All return trees like that of
        `reference`.

    **Returns:**

    What is called returns.
    """
    if not kernels:
        return reference()
    on = {_PLATFORMS[name]: run for name, run in kernels.items()}
    return lax.platform_dependent(default=reference, **on)
