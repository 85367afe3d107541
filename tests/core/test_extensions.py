"""Mistakes in a user's own files are named with file, class and what is expected."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.extensions import defined_in, described

HEAD = "from dataclasses import dataclass\nfrom mmjax.{kind}.base import {base}\n"
SOURCE = HEAD.format(kind="sources", base="Source")
# Kind, text of the file, and the error that it gets.
WRONG = {
    "syntax": (
        "sources",
        "x = 1\ndef broken(:\n",
        r"sources/syntax_of_this_test\.py cannot be imported\. SyntaxError: .*syntax_of_this_test\.py:2\)",
    ),
    "raises": (
        "sources",
        "x = 1\n\ny = x.no_such\n",
        r"AttributeError: 'int' object has no attribute 'no_such' \(.*raises_of_this_test\.py:3\)",
    ),
    "abstract": (
        "sources",
        f"{SOURCE}@dataclass(frozen=True)\nclass AbstractOfThisTest(Source):\n    label = 'x'\n",
        r"lacks open: see Source of mmjax\.sources\.base\. \(AbstractOfThisTest in .*abstract_of_this_test\.py\)",
    ),
    "bare": (
        "sources",
        f"{SOURCE}class BareOfThisTest(Source):\n    label, open = 'x', print\n    count: int = 3\n",
        "derives from a dataclass and is none itself",
    ),
    "plain": ("sources", "class PlainOfThisTest:\n    pass\n", "is no dataclass"),
    "stranger": (
        "evaluators",
        f"{SOURCE}@dataclass(frozen=True)\nclass StrangerOfThisTest:\n    x: int = 3\n",
        r"does not derive from Evaluator of mmjax\.evaluators\.base\.",
    ),
    "block": (
        "blocks",
        f"{SOURCE}@dataclass(frozen=True)\nclass BlockOfThisTest:\n    x: int = 3\n",
        r"lacks the method build\(width\)",
    ),
    "hint": (
        "sources",
        f"from __future__ import annotations\n{SOURCE}@dataclass(frozen=True)\n"
        "class HintOfThisTest(Source):\n    label, open = 'x', print\n    count: Many = 3\n",
        "has a field whose type cannot be read: NameError: name 'Many' is not defined",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_class_that_cannot_be_built_is_named_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, text, words = WRONG[name]
    package = importlib.import_module(configs.KINDS[kind])
    monkeypatch.setattr(package, "__path__", list(package.__path__))
    monkeypatch.setattr(configs, "_added", [])
    (tmp_path / kind).mkdir()
    (tmp_path / kind / f"{name}_of_this_test.py").write_text(text)
    configs.add_folder(str(tmp_path))
    with pytest.raises(UserError, match=words) as raised:
        configs.component(kind, {"name": f"{name}_of_this_test"}, "a")
    assert str(tmp_path / kind / f"{name}_of_this_test.py") in str(raised.value)


def test_every_component_of_mmjax_passes() -> None:
    for kind, package in configs.KINDS.items():
        for name in configs.names(kind):
            cls = configs.resolve(kind, name, "a")
            if f"mmjax/{'/'.join(package.split('.')[1:])}/" in defined_in(cls):
                configs.check_class(cls, kind, package, name)


def test_an_error_is_described_with_the_users_line() -> None:
    def users() -> None:
        re.compile("(")  # raised by the standard library

    with pytest.raises(re.error) as raised:
        users()
    line = users.__code__.co_firstlineno + 1
    words = described(raised.value)
    assert words.endswith(f"test_extensions.py:{line})"), words
    assert re.match(r"(error|PatternError): missing \), unterminated subpattern", words)
