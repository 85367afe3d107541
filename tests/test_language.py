"""Prose, docstrings and names follow the rules of `tests/extra/words.py`."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.extra import words

ROOT = Path(__file__).resolve().parent.parent
Line = tuple[int, str]
# Most files have none, and need no tokens.
ANY_PHRASE = re.compile("|".join(rf"\b{pattern}\b" for pattern in words.PHRASES), re.IGNORECASE)
# Strings of names: `"logits, mask"`, as arguments of `parametrize`.
NAMES_ONLY = re.compile(r"""["'][\w.]+(, ?\w+)*["']""")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef

# --- the rules ----------------------------------------------------------------------------------


def prose(suffix: str, text: str) -> Iterator[Line]:
    """Yield the numbered lines that are read as prose: of Python, its comments and strings without `{...}`."""
    if suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] != "code")
    if suffix != ".py":
        yield from enumerate(text.split("\n"), 1)
        return
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds and not NAMES_ONLY.fullmatch(token.string):
            string = re.sub(r"\{[^{}]*\}", "{}", token.string)
            yield from enumerate(string.split("\n"), token.start[0])


def phrases_in(suffix: str, text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (line number, line, phrase, what to write instead) for each refused phrase of a file."""
    if not ANY_PHRASE.search(text):
        return
    for number, line in prose(suffix, text):
        for pattern, instead in words.PHRASES.items():
            if match := re.search(
                rf"(?<![.\w]){pattern}\b", re.sub(r"`[^`]*`", "`", line), re.IGNORECASE
            ):
                yield number, line.strip(), match[0], instead


def is_property(node: Documented) -> bool:
    decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
    return any(d.endswith(("property", ".setter")) for d in decorators)


def fault_of(node: Documented) -> str:
    """Return what is wrong with the docstring of a module, class or function; empty if nothing is."""
    docstring = ast.get_docstring(node)
    if docstring is None:
        return ""
    summary = docstring.split("\n\n")[0].strip()
    first = re.split(r"[\s,:;.]", summary, maxsplit=1)[0]
    if first in words.FRAGMENTS:
        return f"begins with the fragment word '{first}'"
    if summary[-1] not in ".?!":
        return "does not end its first paragraph with a full stop"
    if (
        isinstance(node, ast.FunctionDef)
        and not is_property(node)
        and first not in words.FIRST_VERBS
    ):
        return f"begins with '{first}', which is no verb of FIRST_VERBS; say 'Return ...'"
    return ""


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line number, name) of what a file binds: variables, arguments, attributes, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def refused_names(tree: ast.AST) -> list[tuple[int, str]]:
    return [(line, name) for line, name in bound_names(tree) if name.strip("_") in words.NAMES]


# --- on examples ----------------------------------------------------------------------------------

GOOD = (
    '"""Text: token ids, and their stem."""',
    'class A:\n    """A block of two layers."""',
    'def f():\n    """Return the mean, `[B]`: over what is valid."""',
    'def f():\n    """Raise `UserError` if a field is missing.\n\n    Of several, the first.\n    """',
    'class A:\n    @property\n    def size(self):\n        """The number of tokens."""',
    "def f():\n    return 1",
)
BAD = {
    '"""Of each row and modality: the summed loss."""': "fragment word 'Of'",
    'class A:\n    """What a layer builds."""': "fragment word 'What'",
    'class A:\n    @property\n    def size(self):\n        """How many there are."""': "word 'How'",
    'def f():\n    """Whether it is."""': "fragment word 'Whether'",
    'def f():\n    """The mean of each row."""': "no verb of FIRST_VERBS",
    'def f():\n    """Return the mean"""': "full stop",
}


def faults(source: str) -> list[str]:
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, Documented)]
    return [fault for n in nodes if (fault := fault_of(n))]


@pytest.mark.parametrize("source", GOOD)
def test_a_docstring_that_follows_the_rule_passes(source: str) -> None:
    assert faults(source) == []


@pytest.mark.parametrize(("source", "fault"), BAD.items())
def test_a_fragment_is_found(source: str, fault: str) -> None:
    (only,) = faults(source)
    assert fault in only


def test_refused_phrases_are_found_in_comments_strings_and_text() -> None:
    python = (
        'said = 1  # it goes on\nx = f"Mend {said} or `mend`"\n"""\nfine\nA run says so.\n"""\n'
    )
    phrases = [(number, phrase) for number, _, phrase, _ in phrases_in(".py", python)]
    assert phrases == [(1, "goes on"), (2, "Mend"), (5, "says")]
    assert [p for _, _, p, _ in phrases_in(".md", "All is well.\nIt left out one.")] == ["left out"]
    notebook = json.dumps(
        {
            "cells": [
                {"cell_type": "markdown", "source": ["A person\n"]},
                {"cell_type": "code", "source": ["said"]},
            ]
        }
    )
    assert [p for _, _, p, _ in phrases_in(".ipynb", notebook)] == ["A person"]


def test_a_name_within_another_word_is_no_phrase() -> None:
    assert list(phrases_in(".md", "amend recommend foretold untold personal")) == []


def test_refused_names_are_found_wherever_they_are_bound() -> None:
    source = """
def made(own, *, _rest=1):
    found: int = 0
    for each, (more, table) in rows: self.kept = each
    return [told for told in results] + found_rows
class held: pass
"""
    names = [name for _, name in refused_names(ast.parse(source))]
    assert sorted(names) == [
        "_rest",
        "each",
        "found",
        "held",
        "kept",
        "made",
        "more",
        "own",
        "told",
    ]


# --- on the repository ----------------------------------------------------------------------------

MODULES = sorted(p for p in (ROOT / "mmjax").rglob("*.py") if not p.stem.endswith("_pb2"))


def python_files() -> Iterator[Path]:
    """Yield the Python files whose docstrings follow the rule."""
    for folder in words.DOCUMENTED:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not skipped(path):
                yield path


def files() -> Iterator[Path]:
    """Yield the files that are read, in order."""
    for name in words.READ:
        path = ROOT / name
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (p for p in inside if p.suffix in words.SUFFIXES and not skipped(p))


def skipped(path: Path) -> bool:
    relative = path.relative_to(ROOT).as_posix()
    return path.stem.endswith("_pb2") or any(
        relative == name or relative.startswith(f"{name}/") for name in words.ALLOWED_FILES
    )


def is_allowed(path: Path, line: str) -> bool:
    relative = path.relative_to(ROOT).as_posix()
    return any(relative == file and part in line for file, part in words.ALLOWED_LINES)


def test_no_phrase_reads_as_translated() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number}: '{phrase}' (write: {instead}): {line}"
        for path in files()
        for number, line, phrase, instead in phrases_in(path.suffix, path.read_text())
        if not is_allowed(path, line)
    ]
    assert hits == []


def test_every_exception_is_needed() -> None:
    for file, part in words.ALLOWED_LINES:
        text = (ROOT / file).read_text()
        hits = list(phrases_in(Path(file).suffix, text))
        assert any(part in line for _, line, _, _ in hits), (file, part)
    assert all((ROOT / name).exists() for name in words.ALLOWED_FILES)


def documented(path: Path, source: str) -> Iterator[Documented]:
    """Yield what has a docstring that follows the rule: all but tests, whose names are sentences themselves."""
    for node in ast.walk(ast.parse(source)):
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if isinstance(node, Documented) and not (is_test and "tests" in path.parts):
            yield node


def test_helpers_are_documented_and_tests_are_not() -> None:
    source = "def helper(): pass\ndef test_it(): pass\n"
    for path, expected in (
        (Path("tests/test_x.py"), ["helper"]),
        (Path("x.py"), ["helper", "test_it"]),
    ):
        names = [n.name for n in documented(path, source) if isinstance(n, ast.FunctionDef)]
        assert names == expected


def test_docstrings_begin_with_a_sentence() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {fault}"
        for path in python_files()
        for node in documented(path.relative_to(ROOT), path.read_text())
        if (fault := fault_of(node))
    ]
    assert hits == []


def test_names_are_the_thing_itself() -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in MODULES
        for line, name in refused_names(ast.parse(path.read_text()))
    ]
    assert hits == []
