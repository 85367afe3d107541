"""What a source is: examples under integer ids, read at random.

A source is one file in `mmjax/sources/`, whose class is a frozen dataclass (the keys of a config block)
with `open()`.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mmjax.errors import UserError

Example = Mapping[str, Any]


class Examples(abc.ABC):
    """Random access to the examples of one split; safe to read from several threads.

    Attributes:
      description: what errors and reports call it.
      identity: a digest of the data; another one under a run that exists is refused.
      fields: names of an example's fields.
      credits: whom to name where examples are shown, as their licences ask.
      labels: names of the classes 0, 1, ... of integer fields, where the data has such.
    """

    description: str
    identity: str
    fields: tuple[str, ...]
    credits: tuple[str, ...] = ()
    labels: Mapping[str, Sequence[str]] = MappingProxyType({})

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """The example `index`, 0 <= index < len."""

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def column(self, name: str) -> list[int]:
        """An integer field of every example; sources that know it without reading all of them say it faster."""
        return [int(example[name]) for example in self]


@dataclass(frozen=True)
class Source(abc.ABC):
    """Where examples come from; opened only when a run needs them."""

    @abc.abstractmethod
    def open(self) -> Examples:
        """Open it; a `UserError` says what to run where data is missing or half built."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """A short name for results: the split."""


class Cached(Examples):
    """Keeps examples in memory as they are read, up to `limit` bytes.

    Pickled, it is what another process opens anew by `source`, with nothing kept.
    """

    def __init__(self, inner: Examples, limit: int, source: Source | None = None):
        self._inner, self._left = inner, limit
        self._again = (source, limit, inner.identity)
        self._kept: dict[int, Example] = {}
        self._lock = threading.Lock()
        self.description, self.identity, self.fields = (
            inner.description,
            inner.identity,
            inner.fields,
        )
        self.credits, self.labels = inner.credits, inner.labels

    def __len__(self) -> int:
        return len(self._inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, self._again

    def __getitem__(self, index: int) -> Example:
        example = self._kept.get(index)
        if example is None:
            example = self._inner[index]
            self._keep(index, example)
        return example

    def _keep(self, index: int, example: Example) -> None:
        size = sum(_size(v) for v in example.values())
        with self._lock:
            if index not in self._kept and size <= self._left:
                self._kept[index] = example
                self._left -= size


def _reopened(source: Source | None, limit: int, identity: str) -> Cached:
    """The examples of a source, in another process; `UserError` where they are not those that were open."""
    if source is None:
        raise TypeError("These examples were opened without word of their source.")
    made = Cached(source.open(), limit, source)
    if made.identity != identity:
        raise UserError(f"{made.description} has changed since the run opened it. Run again.")
    return made


def _size(value: Any) -> int:
    return (
        int(value.nbytes)
        if isinstance(value, np.ndarray)
        else len(value)
        if isinstance(value, (bytes, str))
        else 32
    )
