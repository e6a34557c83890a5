"""The table of reports in `tests/README.md` names tests that exist."""

import ast
import re
from pathlib import Path

import pytest


_HERE = Path(__file__).parent
_TABLE, _LIMITS = (_HERE / "README.md").read_text().split("## Limits")
_ROWS = [line.strip("|").split("|") for line in _TABLE.splitlines() if "| FP-" in line]
_TESTS = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def _defined(path: Path) -> set[str]:
    """The tests of a file, read from its source."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_every_report_has_one_row_and_a_thread_in_public():
    entries = [row[0].strip() for row in _ROWS]
    assert len(entries) == len(set(entries)) == 62
    for row in _ROWS:
        assert len(row) == 6, row
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", row[2].strip()), row


@pytest.mark.parametrize("row", _ROWS, ids=[row[0].strip() for row in _ROWS])
def test_every_test_named_exists(row):
    tests = _TESTS.findall(row[4])
    assert len(tests) == row[4].count("`") // 2 > 0
    for file, name in tests:
        assert name in _defined(_HERE / file), f"{file}::{name}"


def test_nothing_is_open():
    assert {row[5].strip() for row in _ROWS} == {"green"}
    known = {row[0].strip() for row in _ROWS}
    limits = re.findall(r"^- (FP-\d+): ", _LIMITS, re.MULTILINE)
    assert limits
    assert set(limits) <= known


def test_every_test_of_a_report_has_a_row():
    named = {test for row in _ROWS for test in _TESTS.findall(row[4])}
    for path in _HERE.rglob("test_reports_*.py"):
        if path != Path(__file__):
            for name in _defined(path):
                assert (path.relative_to(_HERE).as_posix(), name) in named, name
