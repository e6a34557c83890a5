"""The arrows between modules: what may import what, read from the source."""

import ast
from pathlib import Path

import equilax
import equilax_kernels
import pytest


# From the bottom to the top. A module may import from lines above its own, and from
# siblings within its own folder.
_ORDER = (
    ("equilax_kernels",),
    ("_custom_types", "_dtype"),
    ("_mesh",),
    ("_check", "_solution"),
    ("_norm",),
    ("_convolution",),
    ("_misc", "_eager", "_failure", "_ravel"),
    ("_batching",),
    ("_krylov", "_singular_value", "_trace"),
    ("_bounds", "_solver"),
    ("_axis_names", "_fused"),
    ("_linear",),
    ("_adjoint",),
    ("_settings",),
    ("_fixed_point", "_solve_adjoint"),
    ("_diagnostics",),
    ("sharding",),
    ("nn",),
)
_LEVEL = {name: i for i, names in enumerate(_ORDER) for name in names}
_ROOT = Path(equilax.__file__).parent
_KERNELS = Path(equilax_kernels.__file__).parent
_FILES = sorted(_ROOT.rglob("*.py"))


def _part(path: Path) -> str:
    """The module, or the folder, of which the arrows speak."""
    return path.relative_to(_ROOT).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[tuple[int, str | None, list[str]]]:
    """Each import as its level of dots, its module, and its names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module, [a.name for a in node.names]))
        elif isinstance(node, ast.Import):
            found += [(0, a.name, []) for a in node.names]
    return found


def _targets(path: Path) -> set[str]:
    """The parts of the package that a file imports from."""
    depth = len(path.relative_to(_ROOT).parts)
    targets = set()
    for level, module, names in _imports(path):
        if level == 0 and module and module.split(".")[0] == "equilax_kernels":
            targets.add("equilax_kernels")
        elif level == depth:
            targets |= {module.split(".")[0]} if module else set(names)
        assert level <= depth
        assert not (level == 0 and module and module.split(".")[0] == "equilax")
    return targets


def test_every_module_has_a_place_in_the_order():
    assert {_part(path) for path in _FILES} == {"__init__", *_LEVEL.keys()} - {
        "equilax_kernels"
    }


@pytest.mark.parametrize(
    "path", _FILES, ids=[str(path.relative_to(_ROOT)) for path in _FILES]
)
def test_arrows_point_down(path):
    part = _part(path)
    if part == "__init__":
        return
    for target in _targets(path):
        assert _LEVEL[target] < _LEVEL[part], f"{part} imports {target}"


def test_the_check_sees_an_arrow_that_points_up():
    assert "_solver" in _targets(_ROOT / "_adjoint" / "base.py")
    assert "equilax_kernels" in _targets(_ROOT / "_solver" / "least_squares.py")


@pytest.mark.parametrize("root", [_ROOT, _KERNELS], ids=["equilax", "kernels"])
def test_no_import_stands_inside_a_function(root):
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        at_top = sum(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)
        assert len(_imports_nodes(tree)) == at_top, path


def _imports_nodes(tree):
    return [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_init_files_only_re_export():
    for path in _ROOT.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            is_version = isinstance(node, ast.Assign) and path.parent == _ROOT
            assert isinstance(node, (ast.Import, ast.ImportFrom)) or is_version, path


def test_kernels_know_arrays_alone():
    allowed = {"collections", "enum", "functools", "jax", "jaxtyping", "math", "typing"}
    for path in _KERNELS.rglob("*.py"):
        for level, module, _ in _imports(path):
            assert level > 0 or (module and module.split(".")[0] in allowed), path


def test_no_file_is_long_and_no_function_leaves_the_screen():
    for root in (_ROOT, _KERNELS):
        for path in root.rglob("*.py"):
            text = path.read_text()
            assert len(text.splitlines()) <= 260, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno:
                    doc = ast.get_docstring(node) or ""
                    length = node.end_lineno - node.lineno - len(doc.splitlines())
                    assert length <= 65, f"{path}: {node.name}"
