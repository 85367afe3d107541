"""Published values of the systems that `configs/` has at their size: literals with their sources.

Keys are those of `resolved.resolve`, so that a default counts as what is written. A row whose value here is not the
published one has its reason, and words of the recipe's header for it. Marks of a source: [C] read in the authors'
code, [P] in the paper, [K] from memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One key of a recipe.

    Attributes:
      key: as `resolve` names it; empty for a part of the system that is missing here.
      here, published: values; None where nothing is published, or nothing is here.
      source: of what is published.
      why: the reason of a difference.
      words: of the header, that state it.
    """

    key: str
    here: Any
    published: Any
    source: str
    why: str = ""
    words: str = ""


@dataclass(frozen=True)
class Recipe:
    """A config file with a setting.

    Attributes:
      name: `SYSTEM:SETTING`.
      headers: files whose docstrings state the differences.
    """

    name: str
    headers: tuple[str, ...]
    rows: tuple[Row, ...]


def setting(*words: str) -> str:
    """Return the name `SYSTEM:SETTING` of these words; empty ones are at their default."""
    return "-".join(word for word in words if word)


def same(source: str, values: Mapping[str, Any], at: str = "") -> list[Row]:
    """Return rows of values as published."""
    return [Row(at + key, value, value, source) for key, value in values.items()]


def ours(why: str, words: str, values: Mapping[str, Any], at: str = "") -> list[Row]:
    """Return rows of values of which nothing is published, or nothing that is known here."""
    return [Row(at + key, value, None, "none", why, words) for key, value in values.items()]


def missing(source: str, *words: str) -> list[Row]:
    """Return rows of parts that a system has and its recipe lacks, as the header names them."""
    return [Row("", None, each, source, "not implemented", each) for each in words]


ADAMW = {
    "optimizer.algorithm.name": "adamw",
    "optimizer.unit": "steps",
    "optimizer.ema": 0.0,
    "optimizer.accumulate": 1,
}
PLAIN = {
    "optimizer.unit": "steps",
    "optimizer.ema": 0.0,
    "optimizer.accumulate": 1,
    "schedule.rule": "shares",
}
