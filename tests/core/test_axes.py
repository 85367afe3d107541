"""The legend of axis letters names every letter that the code uses, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmjax.core.axes import LEGEND

PACKAGE = Path(__file__).resolve().parent.parent.parent / "mmjax"
SUFFIX = re.compile(r"[a-z]\w*_([A-Z]{1,6})")
SHAPE = re.compile(r"`[^`\[]*\[((?:[^\[\]`,]+, )*[^\[\]`,]+)\][^`]*`")


def in_names(tree: ast.AST) -> Iterator[str]:
    """Yield the letters of axes in the names of variables and arguments."""
    for node in ast.walk(tree):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "arg", None) or ""
        if match := SUFFIX.fullmatch(name):
            yield from match[1]


def in_docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield the letters of shapes such as `[B, S, D]` in docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for shape in SHAPE.findall(ast.get_docstring(node) or ""):
                yield from (axis for axis in shape.split(", ") if re.fullmatch("[A-Z]", axis))


def letters(source: str) -> set[str]:
    tree = ast.parse(source)
    return {*in_names(tree), *in_docstrings(tree)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x_BSD, *, key): y_Q = x_BSD", {"B", "S", "D", "Q"}),
        ('def f():\n    """Return the mean, float32 `[B, K]`, of `x`."""', {"B", "K"}),
        ("MAX_PERIOD = PRESENT_AT = 1", set()),
    ],
)
def test_letters_are_found_in_names_and_docstrings(source: str, expected: set[str]) -> None:
    assert letters(source) == expected


def test_the_legend_names_every_letter_and_no_other() -> None:
    used = {letter for path in PACKAGE.rglob("*.py") for letter in letters(path.read_text())}
    assert used == LEGEND.keys()
