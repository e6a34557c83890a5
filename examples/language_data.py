"""The text of the language example: Python's language reference, as pydoc shows it.

It comes with every Python, and differs a little from one version to the next.
"""

import collections
import hashlib
import pydoc_data.topics
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


HELD_OUT_EVERY = 8  # Of the topics, in the order of their names.
_LEAST = 20  # Rarer characters are all one symbol.
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Text(NamedTuple):
    characters: str  # The vocabulary: a symbol is a place in it.
    train: np.ndarray  # Symbols, one text after another.
    held_out: np.ndarray
    digest: str  # Of all topics, before anything is done to them.


def load_text() -> Text:
    """The same for every seed."""
    topics: dict[str, str] = pydoc_data.topics.topics
    content = "".join(f"{k}\0{topics[k]}\0" for k in sorted(topics))
    train, held_out = split(topics)
    counts = collections.Counter(train)
    common = sorted(c for c, n in counts.items() if n >= _LEAST)
    characters = "".join(common) + UNKNOWN
    return Text(
        characters,
        encode(train, characters),
        encode(held_out, characters),
        hashlib.sha256(content.encode()).hexdigest(),
    )


def split(topics: dict[str, str]) -> tuple[str, str]:
    """The text to train on, and that of whole topics held out.

    Topics are sections of one book, and some are parts of others. A paragraph that
    occurs in a topic held out is taken out of those to train on, however its lines are
    broken.
    """
    names = sorted(topics)
    held_out = [topics[k] for k in names[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]]
    seen = {_words(p) for topic in held_out for p in paragraphs(topic)}
    train = []
    for i, name in enumerate(names):
        if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2:
            train += [p for p in paragraphs(topics[name]) if _words(p) not in seen]
    return "\n\n".join(train), "\n\n".join(held_out)


def paragraphs(topic: str) -> list[str]:
    """What stands between empty lines."""
    return [p for p in topic.split("\n\n") if p.strip()]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def encode(text: str, characters: str) -> np.ndarray:
    symbols = {c: i for i, c in enumerate(characters)}
    unknown = symbols[UNKNOWN]
    return np.array([symbols.get(c, unknown) for c in text], np.int32)


def batch(
    symbols: np.ndarray, size: int, length: int, *, seed: int, step: int
) -> np.ndarray:
    """Windows at random, of `length` characters and the one that follows.

    They depend on the seed and the number of the step alone.
    """
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(symbols) - length, size)
    return symbols[starts[:, None] + np.arange(length + 1)]


def windows(symbols: np.ndarray, length: int) -> np.ndarray:
    """The whole text, each window from the last character of the one before."""
    starts = np.arange(0, len(symbols) - length, length)
    return symbols[starts[:, None] + np.arange(length + 1)]


def batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in order, a last batch that is not full left out."""
    for start in range(0, len(rows) - size + 1, size):
        yield rows[start : start + size]
