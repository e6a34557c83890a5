"""The published algorithm of safeguarded type-I Anderson acceleration, in NumPy.

Zhang, O'Donoghue and Boyd 2020, algorithm AA-I-S-m, with the inverse estimate as a
dense matrix: to tell a slow instance from a fault of ours. After a step that was not
accelerated it keeps the secant of the trial, where `equilax.AndersonTypeI` keeps none.
"""

from collections.abc import Callable

import numpy as np


MEMORY, DAMP = 5, 0.1
REGULARISATION, INDEPENDENCE = 0.01, 1e-3
BOUND, POWER = 1e6, 1 + 1e-6


def solve(fn: Callable, y: np.ndarray, ratio: float, *, max_steps: int) -> int | None:
    """The steps until the residual has fallen by `ratio`."""
    g = y - fn(y)
    first, num_accelerated = np.linalg.norm(g), 0
    inverse, units = np.eye(len(y)), []
    for num in range(1, max_steps + 1):
        trial = y - inverse @ g
        step = trial - y
        trial_g = trial - fn(trial)
        change, old_g = trial_g - g, g
        if np.linalg.norm(g) <= BOUND * first * (num_accelerated + 1) ** -POWER:
            num_accelerated, y, g = num_accelerated + 1, trial, trial_g
        else:
            y = y - (1 - DAMP) * g
            g = y - fn(y)
        if np.linalg.norm(g) < ratio * first:
            return num
        new = step - sum(((u @ step) * u for u in units), np.zeros_like(y))
        is_dependent = np.linalg.norm(new) < INDEPENDENCE * np.linalg.norm(step)
        if len(units) == MEMORY or is_dependent:
            inverse, units, new = np.eye(len(y)), [], step
        gamma = new @ inverse @ change / (new @ new)
        theta = 1.0
        if abs(gamma) < REGULARISATION:
            theta = (1 - np.copysign(REGULARISATION, gamma)) / (1 - gamma)
        secant = inverse @ (theta * change - (1 - theta) * old_g)
        row = new @ inverse
        inverse = inverse + np.outer(step - secant, row) / (new @ secant)
        units.append(new / np.linalg.norm(new))
    return None
