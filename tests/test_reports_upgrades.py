"""What a later JAX may take away, of the kinds that `tests/README.md` lists."""

import ast
import importlib
import warnings
from pathlib import Path

import equilax
import equilax_kernels
import pytest


_ROOTS = [Path(equilax.__file__).parent, Path(equilax_kernels.__file__).parent]
_FILES = sorted(path for root in _ROOTS for path in root.rglob("*.py"))
# Private, deprecated, or gone from a later version.
_GONE = (
    "jax._src",
    "jax.experimental.maps",
    "jax.experimental.pjit",
    "jax.experimental.shard_map",
    "jax.interpreters.ad",
    "jax.interpreters.xla",
    "jax.linear_util",
    "jax.pmap",
    "jax.tree_map",
    "jax.xla_computation",
)


def _names(source):
    """Names of JAX's in full, as far as a file spells them."""
    found, short = set(), {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                found.add(a.name)
                short[a.asname or a.name.split(".")[0]] = (
                    a.name if a.asname else a.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
            short |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts and node.id in short:
            found.add(".".join([short[node.id], *reversed(parts)]))
    return {name for name in found if name.split(".")[0] == "jax"}


def _is_gone(name):
    return any(name == gone or name.startswith(f"{gone}.") for gone in _GONE)


def _resolve(name):
    """The value of a dotted name, which may warn."""
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for k, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            value = importlib.import_module(".".join(parts[:k]))
        else:
            value = getattr(value, part)
    return value


def test_nothing_private_or_deprecated_of_jax_is_named():
    names = set()
    for path in _FILES:
        source = path.read_text()
        found = _names(source)
        assert not [name for name in found if _is_gone(name)], path
        assert "check_rep" not in source, path
        names |= found
    assert {
        "jax.vmap",
        "jax.lax.while_loop",
        "jax.custom_batching.custom_vmap",
    } <= names
    # What is about to go warns when it is looked up.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in sorted(names):
            if not name.startswith("jax.experimental.pallas"):
                try:
                    _resolve(name)
                except (AttributeError, ImportError):
                    # An attribute of a value, such as `.dtype` of a function's result.
                    assert name.count(".") > 1, name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (
            "from jax.experimental.shard_map import shard_map",
            "jax.experimental.shard_map",
        ),
        ("import jax\nf = jax.pmap(g)", "jax.pmap"),
        ("import jax.interpreters.ad as ad\nad.primitive_jvps", "jax.interpreters.ad"),
        ("from jax._src import core", "jax._src"),
    ],
)
def test_the_search_sees_what_it_looks_for(source, name):
    found = [n for n in _names(source) if _is_gone(n)]
    assert found
    assert all(n.startswith(name) for n in found)
