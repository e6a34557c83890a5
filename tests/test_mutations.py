"""The faults of `python -m tests.mutations` can still be put in."""

from pathlib import Path

import pytest

from .mutations import ALL


_ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", ALL, ids=lambda m: m.name.replace(" ", "_"))
def test_a_fault_has_its_place_and_its_tests(mutation):
    assert (_ROOT / mutation.path).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert all((_ROOT / t).is_file() for t in mutation.tests if t.endswith(".py"))


def test_names_choose_one_fault_each():
    names = [m.name for m in ALL]
    assert sorted(names) == sorted(set(names))
