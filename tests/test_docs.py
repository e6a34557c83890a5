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


@pytest.mark.parametrize(
    ("page", "kinds"),
    [
        ("solvers.md", (eqlx.AbstractFixedPointSolver,)),
        ("gradients.md", (eqlx.AbstractAdjoint, eqlx.AbstractMatrixFreeSolver)),
    ],
)
def test_a_guide_has_all_that_there_is(page, kinds):
    text = (_ROOT / "docs" / page).read_text()
    for name in dir(eqlx):
        value = getattr(eqlx, name)
        is_one = isinstance(value, type) and issubclass(value, kinds)
        if is_one and not name.startswith("Abstract"):
            assert re.search(rf"\b{name}\b", text), name


@pages
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
