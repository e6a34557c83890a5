from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault.

    **Attributes:**

    - `name`: What has gone wrong.
    - `path`: The file, from the root of the tree.
    - `old`, `new`: The text that stands there once, and that which takes its place.
    - `tests`: The arguments of pytest that select the tests that should find it.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
