"""What a contender is: a layer of ours, of another library, or by hand."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeVar


Make = Callable[[Callable, Any, Any, int], Callable]

# Of one solve, or one with its gradient. What takes longer is not timed.
MOST_SECONDS = 20.0


Found = TypeVar("Found")


def in_time(run: Callable[[], Found]) -> Found:
    """What `run` returns; an error that says so if that took too long."""
    start = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - start
    if seconds > MOST_SECONDS:
        raise TimeoutError(f"takes {seconds:.0f} s: not timed")
    return found


@dataclasses.dataclass(frozen=True)
class Contender:
    """**Attributes:**

    - `make`: `(fn, forward, backward, max_steps)` to `run(z0, args)`.
    - `is_whole`: Whether a batch is one problem to it, and not each sample.
    - `is_static`: Whether its tolerances are constants of a program.
    - `is_tied`: Whether it has no tolerance of its own backwards.
    - `is_exempt`: Whether it is timed as it is, whatever its error.
    - `reason`: Why it has no gradient, if so.
    """

    library: str
    name: str
    make: Make
    is_whole: bool = False
    is_static: bool = False
    is_tied: bool = False
    is_exempt: bool = False
    reason: str = ""

    @property
    def row(self) -> str:
        whole = ", whole batch" if self.is_whole else ""
        return f"{self.library}, {self.name}{whole}"
