"""A source of numbers, in memory or in a file, with records that cannot be read where a test wants them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from mmjax.sources.base import Example, Examples, Source

ROWS, SIZE = 4, 6


@dataclass(frozen=True)
class Toy(Source):
    """Attributes:
    count: number of examples.
    corrupt: ids whose reading fails.
    file: a .npy file with the values `[count, ROWS, SIZE]`; made from the ids where empty.
    """

    count: int = 40
    corrupt: tuple[int, ...] = ()
    file: str = ""

    @property
    def label(self) -> str:
        return "toy"

    def open(self) -> Examples:
        return ToyExamples(self)


class ToyExamples(Examples):
    def __init__(self, source: Toy):
        self._source = source
        self._values = values(source.count)
        if source.file:
            self._values = np.load(epath.Path(source.file).open("rb"))
        self.description = f"toy {source.count}"
        self.identity = hashlib.sha256(self._values.tobytes()).hexdigest()
        self.fields = ("values", "id", "label")

    def __len__(self) -> int:
        return self._source.count

    def __getitem__(self, index: int) -> Example:
        if index in self._source.corrupt:
            raise ValueError(f"record {index} is garbage")
        return {"values": self._values[index], "id": index, "label": index % 5}


def values(count: int) -> np.ndarray[Any, Any]:
    """Return `[count, ROWS, SIZE]` float32."""
    return np.random.default_rng(7).normal(size=(count, ROWS, SIZE)).astype(np.float32)
