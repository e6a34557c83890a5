"""What the examples' tables and metrics files share."""

import math
from typing import Any

import equinox as eqx
import jax


def two_columns(rows: dict[str, str]) -> str:
    """A name and what it is a line, in two columns."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def or_none(x: float) -> float | None:
    """JSON has no NaN."""
    return float(x) if math.isfinite(x) else None


def num_parameters(model: Any) -> int:
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return sum(x.size for x in leaves)
