"""The interface of a source: examples under integer ids, read at random.

A source is one file in `mmjax/sources/`, whose class is a frozen dataclass (the keys of a config block)
with `open()`.
"""

from __future__ import annotations

import abc
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mmjax.core.errors import RecordError, UserError
from mmjax.data.identity import is_same

Example = Mapping[str, Any]

_INT32 = np.iinfo(np.int32)


class Examples(abc.ABC):
    """Random access to the examples of one split; safe to read from several threads.

    Attributes:
      description: what errors and reports call it.
      identity: a digest of the data, see `mmjax.data.identity`; other data under a run that exists are refused.
      fields: names of an example's fields.
      credits: those whom the licences require to be named where examples are shown.
      labels: names of the classes 0, 1, ... of integer fields, where the data has such.
    """

    description: str
    identity: str
    fields: tuple[str, ...]
    credits: tuple[str, ...] = ()
    labels: Mapping[str, Sequence[str]] = MappingProxyType({})

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Return the example `index`, 0 <= index < len."""

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def column(self, name: str) -> list[int]:
        """Return an integer field of every example; sources that know it without reading all of them are faster.

        Raises:
          UserError: an example cannot be read, or its field is no integer.
        """
        return [self._integer(name, index) for index in range(len(self))]

    def _integer(self, name: str, index: int) -> int:
        try:
            return integer(name, self[index][name])
        except Exception as error:
            raise UserError(
                f"Field '{name}' is needed of every example. {self.description}[{index}]: {error}"
            ) from error


@dataclass(frozen=True)
class Source(abc.ABC):
    """A source of examples; opened only when a run needs them."""

    @abc.abstractmethod
    def open(self) -> Examples:
        """Open it; a `UserError` states what to run if data is missing or half built."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """A short name for results: the split."""


class Cached(Examples):
    """Keeps examples in memory as they are read, up to `limit` bytes.

    When pickled, it holds `source` only: another process opens it again, with nothing kept.
    """

    def __init__(self, inner: Examples, limit: int, source: Source | None = None):
        self._inner, self._left = inner, limit
        self._again = (source, limit, inner.identity)
        self._examples_read: dict[int, Example] = {}
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
        example = self._examples_read.get(index)
        if example is None:
            example = self._inner[index]
            self._keep(index, example)
        return example

    def _keep(self, index: int, example: Example) -> None:
        size = memory_of(example, self._left)
        with self._lock:
            if index not in self._examples_read and size <= self._left:
                self._examples_read[index] = example
                self._left -= size


def _reopened(source: Source | None, limit: int, identity: str) -> Cached:
    """Return the examples of a source, in another process; `UserError` where they are not those that were open."""
    if source is None:
        raise TypeError("These examples were opened without word of their source.")
    result = Cached(source.open(), limit, source)
    if not is_same(identity, result.identity):
        raise UserError(f"{result.description} has changed since the run opened it. Run again.")
    return result


def integer(name: str, value: Any) -> int:
    """Return the integer in field `name`; a float, a text or several values are none."""
    if isinstance(value, int):
        return int(value)
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "iub":
        raise RecordError(
            f"field '{name}' is {str(value)[:40]!r} ({type(value).__name__}); expected an integer."
        )
    return int(array)


def int32(name: str, value: Any) -> np.int32:
    """Return the integer in field `name` as batches hold it."""
    number = integer(name, value)
    if not _INT32.min <= number <= _INT32.max:
        raise RecordError(
            f"field '{name}' is {number}, outside [{_INT32.min}, {_INT32.max}]: integers of a batch have 32 bits. "
            "Number its values from 0 on."
        )
    return np.int32(number)


def memory_of(value: Any, limit: int) -> int:
    """Return about how many bytes of memory a value holds, with all that is in it; counting ends beyond `limit`.

    An array that is a view holds the whole memory that it views. A value within two others is counted twice.
    """
    total, inner = 0, [value]
    while inner and total <= limit:
        value = inner.pop()
        if isinstance(value, np.ndarray):
            total += _array_memory(value)
            if value.dtype.hasobject:
                inner.extend(value.ravel().tolist())
        elif isinstance(value, Mapping):
            total += sys.getsizeof(value)
            inner.extend(value.keys())
            inner.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            total += sys.getsizeof(value)
            inner.extend(value)
        else:
            total += _object_memory(value)
    return total


def _array_memory(array: np.ndarray) -> int:
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    whole = base.nbytes if isinstance(base, np.ndarray | memoryview) else sys.getsizeof(base)
    return sys.getsizeof(array) - (array.nbytes if array.base is None else 0) + max(whole, 0)


def _object_memory(value: Any) -> int:
    """Return the memory of a value that is no container: a PIL image has its pixels beside it."""
    if hasattr(value, "getbands") and hasattr(value, "size"):
        depth = 4 if value.mode in ("I", "F") else len(value.getbands())
        return sys.getsizeof(value) + int(value.size[0] * value.size[1] * depth)
    return sys.getsizeof(value) + int(getattr(value, "nbytes", 0))
