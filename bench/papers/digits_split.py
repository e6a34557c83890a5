"""The digits, their split and batches, and what all of the trainings share."""

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


UNITS, CLASSES, BATCH, EPOCHS = 87, 10, 64, 20
NORM, RATE, TOLERANCE, MAX_STEPS = 0.9, 1e-3, 1e-4, 200
TERMS, DAMP = 5, 0.5  # Of the phantom gradient: its steps, and what is left of the old.


def load() -> list[np.ndarray]:
    """Images to train on and held out, then their labels: 1,347 and 450."""
    digits: Any = load_digits()
    images = (digits.data / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    parts: Any = train_test_split(images, labels, test_size=0.25, random_state=0)
    return parts


def batches(num: int, seed: int, epoch: int) -> np.ndarray:
    """The samples of each batch of an epoch; what fills no batch is left out."""
    order = np.random.default_rng([seed, epoch]).permutation(num)
    return order[: num // BATCH * BATCH].reshape(-1, BATCH)
