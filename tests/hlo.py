"""Read the collectives out of the loops of a compiled program."""

import re

import jax


_COLLECTIVE = re.compile(
    r"= [^=]*? (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"
    r"(?:-start)?\("
)


class Program:
    """An optimised module, by computations."""

    def __init__(self, text: str):
        self.parts = {}
        for part in text.split("\n\n"):
            head = part.strip().split("\n", 1)[0]
            self.parts[head.removeprefix("ENTRY ").split(" ", 1)[0]] = part

    def _called(self, name: str, pattern: str) -> list[str]:
        """What a computation calls by one of these attributes."""
        found = re.findall(rf"(?:{pattern})=(%?[\w.\-]+)", self.parts[name])
        for group in re.findall(r"branch_computations=\{([^}]*)\}", self.parts[name]):
            found += group.split(", ")
        return found

    def loops(self) -> list[str]:
        """The bodies of all loops."""
        return [
            name
            for part in self.parts.values()
            for name in re.findall(r"body=(%?[\w.\-]+)", part)
        ]

    def collectives(self, name: str, *, with_inner_loops: bool) -> list[str]:
        """Those of a computation, and of what it calls as often as it does."""
        pattern = "calls|to_apply" + "|body|condition" * with_inner_loops
        found = _COLLECTIVE.findall(self.parts[name])
        for inner in self._called(name, pattern):
            found += self.collectives(inner, with_inner_loops=with_inner_loops)
        return found

    def in_loops(self) -> list[str]:
        """All collectives in the bodies and conditions of loops."""
        conditions = [
            name
            for part in self.parts.values()
            for name in re.findall(r"condition=(%?[\w.\-]+)", part)
        ]
        found = []
        for name in (*self.loops(), *conditions):
            found += self.collectives(name, with_inner_loops=True)
        return found

    def all(self) -> list[str]:
        return [c for part in self.parts.values() for c in _COLLECTIVE.findall(part)]


def program(fn, *args) -> Program:
    """`jax.jit(fn)`, compiled for these arguments."""
    return Program(str(jax.jit(fn).lower(*args).compile().as_text()))
