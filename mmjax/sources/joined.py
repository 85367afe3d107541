"""Two sources joined by an integer field: for example drawings and the spoken names of what they show."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.data.identity import facts_of, identity, records_of
from mmjax.sources.base import Example, Examples, Source


@dataclass(frozen=True)
class Joined(Source):
    """Each example of one source, with fields of an example of another that has the same number.

    An example that has no partner is skipped; of several partners, examples of one number take one after the other.

    Attributes:
      left, right: the sources, as config blocks.
      by: the integer field that both have.
      take: fields of `right` to add; all that `left` lacks, if empty.
    """

    left: dict[str, Any]
    right: dict[str, Any]
    by: str
    take: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return _open(self.left, "left").label

    def open(self) -> Examples:
        one, other = (_open(b, n).open() for b, n in ((self.left, "left"), (self.right, "right")))
        return JoinedExamples(one, other, self.by, self.take)


def _open(block: dict[str, Any], name: str) -> Source:
    result: Source = configs.component("sources", block, f"joined.{name}")
    return result


class JoinedExamples(Examples):
    """Examples of `left`, each with the fields `take` of one of `right`."""

    def __init__(self, left: Examples, right: Examples, by: str, take: Sequence[str]):
        self._left, self._right = left, right
        self._take = tuple(take) or tuple(f for f in right.fields if f not in left.fields)
        self._check(by)
        self.description = f"{left.description} joined with {right.description}"
        self.fields = (*left.fields, *self._take)
        whole = json.dumps(
            ["joined", facts_of(left.identity), facts_of(right.identity), by, self._take]
        )
        records = [*records_of(left.identity), *records_of(right.identity)]
        self.identity = identity(hashlib.sha256(whole.encode()).hexdigest(), records)
        self.credits = tuple(dict.fromkeys((*left.credits, *right.credits)))
        self.labels = {**{n: v for n, v in right.labels.items() if n in self._take}, **left.labels}
        self._pairs = _pairs(left.column(by), right.column(by))
        if not self._pairs:
            raise UserError(f"{self.description}: no value of '{by}' is in both.")

    def _check(self, by: str) -> None:
        for examples, names in ((self._left, (by,)), (self._right, (by, *self._take))):
            for name in names:
                if name not in examples.fields:
                    raise UserError(
                        f"joined reads field '{name}', which {examples.description} lacks. It has: "
                        f"{', '.join(examples.fields)}."
                    )
        clashes = [name for name in self._take if name in self._left.fields]
        if clashes:
            raise UserError(
                f"joined takes field '{clashes[0]}', which {self._left.description} has."
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        left, right = self._pairs[index]
        other = self._right[right]
        return {**self._left[left], **{name: other[name] for name in self._take}}


def _pairs(left: Sequence[int], right: Sequence[int]) -> list[tuple[int, int]]:
    partners: dict[int, list[int]] = defaultdict(list)
    for index, value in enumerate(right):
        partners[value].append(index)
    met: dict[int, int] = defaultdict(int)
    pairs = []
    for index, value in enumerate(left):
        if value in partners:
            pairs.append((index, partners[value][met[value] % len(partners[value])]))
            met[value] += 1
    return pairs
