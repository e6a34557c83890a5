"""The batches of the sharded example: a process makes its own rows of each."""

import numpy as np


_NOISE = 0.05


def local_batch(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    size: int,
    seed: int,
    step: int,
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of the batch of a step, with noise on the images.

    A row depends on the seed, the step and its number alone. So all processes together
    make the same batches however many they are, and a run that is resumed makes those
    that it would have made.

    **Arguments:**

    - `size`: Of the batch, all rows of all processes.
    - `rows`: Which rows to make.
    """
    epoch, i = divmod(step, len(labels) // size)
    order = np.random.default_rng([seed, epoch]).permutation(len(labels))
    chosen = order[i * size + rows]
    # NumPy takes a seed to end in zeros, hence the one: no noise shares the seed of an
    # order.
    noise = [
        np.random.default_rng([seed, step, row, 1]).standard_normal(64) for row in rows
    ]
    flat = images[chosen].reshape(-1, 64)
    return (flat + _NOISE * np.stack(noise)).astype(np.float32), labels[chosen]
