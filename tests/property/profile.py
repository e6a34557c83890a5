"""How many examples to draw, from how many structures.

By default a few, the same in every run. `EQUILAX_EXAMPLES=2000` draws that many in all
of this folder, from more structures, and anew in every run:

`EQUILAX_EXAMPLES=2000 pytest tests/property`

A structure is what a program is compiled for: solver, dtype, size and the like. Values
are drawn freely, and run on a program that is there.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings


NUM_EXAMPLES = int(os.environ.get("EQUILAX_EXAMPLES", "0"))
IS_THOROUGH = NUM_EXAMPLES > 0


def examples(default: int, share: float) -> Callable:
    """Run a property on `default` examples, or on a `share` of those asked for."""
    return settings(
        max_examples=max(int(share * NUM_EXAMPLES), 1) if IS_THOROUGH else default,
        derandomize=not IS_THOROUGH,
        database=None,
        deadline=None,
        # A smaller example would be one of another structure, to be compiled.
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
    )


def choose(
    fields: Mapping[str, Sequence[Any]], default: int, thorough: int
) -> list[dict]:
    """Some of all combinations, in which each value of each field has its turn."""
    num = thorough if IS_THOROUGH else default
    rng = np.random.default_rng(len(fields))
    columns = {}
    for name, values in fields.items():
        turns = -(-num // len(values))
        order = np.concatenate([rng.permutation(len(values)) for _ in range(turns)])
        columns[name] = [values[i] for i in order[:num]]
    return [{name: columns[name][i] for name in fields} for i in range(num)]
