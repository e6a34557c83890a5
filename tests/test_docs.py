"""The code in the documentation runs, and the names in it exist."""

import re
from pathlib import Path

import equilax as eqlx
import jax
import pytest


_ROOT = Path(__file__).parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", _PAGES, ids=[page.name for page in _PAGES])


@pages
def test_the_code_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        with jax.numpy_rank_promotion("allow"):
            for block in blocks:
                exec(compile(block, str(page), "exec"), {})
    assert blocks


def test_the_solvers_are_all_in_the_guide():
    text = (_ROOT / "docs" / "solvers.md").read_text()
    for name in dir(eqlx):
        value = getattr(eqlx, name)
        is_solver = isinstance(value, type) and issubclass(
            value, eqlx.AbstractFixedPointSolver
        )
        if is_solver and not name.startswith("Abstract"):
            assert f"`{name}" in text, name


@pages
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
