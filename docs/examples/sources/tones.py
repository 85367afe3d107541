"""Sine waves, made when they are read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmjax.core.bounds import COUNT, check
from mmjax.sources.base import Example, Examples, Source


@dataclass(frozen=True)
class Tones(Source):
    """The keys of the source.

    Attributes:
      count: number of examples.
      pitches: number of pitches.
    """

    count: int
    pitches: int = 4

    def __post_init__(self) -> None:
        check(self, count=COUNT, pitches=COUNT)

    @property
    def label(self) -> str:
        """The name of the split in tables of results."""
        return f"{self.count} tones"

    def open(self) -> Examples:
        return TonesExamples(self)


class TonesExamples(Examples):
    """Examples under the ids from 0 to `count - 1`, read in any order."""

    description, fields = "tones", ("samples", "pitch")

    def __init__(self, source: Tones):
        # A digest of the data: a run refuses to resume on other data.
        self.source, self.identity = source, str(source)

    def __len__(self) -> int:
        return self.source.count

    def __getitem__(self, index: int) -> Example:
        pitch = index % self.source.pitches
        return {"samples": np.sin(np.arange(8) * (pitch + 1) / 3 + index), "pitch": pitch}
