"""docs/deviations.md: each row names a reason and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "deviations.md"
DEFAULT = "test_parity_with_stock.py"


def _rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "stock"]


def _named(cell):
    """The (file, function) pairs in the last column."""
    names = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", cell)
    return [(file or DEFAULT, function) for file, function in names]


def _functions(file):
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _assert_named_tests_exist(rows):
    for row in rows:
        assert len(row) == 4 and all(row), row
        assert _named(row[3]), row
        for file, function in _named(row[3]):
            assert function in _functions(file), (file, function)


def test_every_deviation_has_a_reason_and_a_test_that_exists():
    rows = _rows()
    assert len(rows) >= 20
    _assert_named_tests_exist(rows)


def test_a_test_that_does_not_exist_is_noticed():
    with pytest.raises(AssertionError):
        _assert_named_tests_exist([["stock", "ours", "reason", "`test_that_nobody_wrote`"]])


def test_every_deviation_test_of_the_parity_file_is_listed():
    """A new `test_stock_...` there is a new row here."""
    shown = {function for row in _rows() for file, function in _named(row[3]) if file == DEFAULT}
    assert {name for name in _functions(DEFAULT) if name.startswith("test_stock_")} <= shown
