"""The digits that come with scikit-learn: 1,797 images of 8 times 8 pixels."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


NUM_TRAIN = 1347
_SHIFTED = 0.3  # The share of images that is moved by a pixel.
_NOISE = 0.05


def load_data() -> tuple[np.ndarray, ...]:
    """Images and labels to train on, then those held out: the same for every seed."""
    digits: Any = load_digits()
    images = (digits.images / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    parts: Any = train_test_split(
        images, labels, train_size=NUM_TRAIN, stratify=labels, random_state=0
    )
    train, test, train_labels, test_labels = parts
    return train, train_labels, test.reshape(-1, 64), test_labels


def batches(
    images: np.ndarray, labels: np.ndarray, size: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of an epoch, augmented by noise and by shifts of a pixel.

    All of it depends on the seed and the epoch alone, so that an epoch begun again
    after a crash is the epoch that it would have been.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(labels))
    shifts = rng.integers(-1, 2, (len(labels), 2))
    shifts[rng.random(len(labels)) >= _SHIFTED] = 0
    noise = _NOISE * rng.standard_normal(images.shape)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    pairs = zip(padded, 1 + shifts, strict=True)
    moved = [image[i : i + 8, j : j + 8] for image, (i, j) in pairs]
    images = (np.stack(moved) + noise).astype(np.float32).reshape(-1, 64)
    for start in range(0, len(labels) - size + 1, size):
        chosen = order[start : start + size]
        yield images[chosen], labels[chosen]
