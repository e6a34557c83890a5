"""A bar, where tqdm is installed: a machine with a GPU may have JAX alone."""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    if importlib.util.find_spec("tqdm") is None:
        return items
    return importlib.import_module("tqdm").tqdm(items, desc=title, leave=False)
