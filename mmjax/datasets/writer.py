"""Writes records as a TFDS directory of ArrayRecord files, without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from mmjax.core.errors import UserError
from mmjax.datasets.build import VERSION

Record = dict[str, Any]
Keyed = Iterable[tuple[str, Record]]
"""Records under keys that differ within a split; the keys alone fix the order in the files."""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    name = "mmjax"  # each instance has its own
    VERSION = tfds.core.Version(VERSION)
    url_infos: ClassVar[dict[str, Any]] = {}  # nothing is downloaded: no checksums to look for

    def __init__(
        self,
        name: str,
        root: epath.Path,
        facts: Mapping[str, Any],
        splits: Mapping[str, Keyed],
    ) -> None:
        self.name, self._facts, self._splits = name, facts, splits
        super().__init__(data_dir=root, file_format="array_record")

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(builder=self, **self._facts)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Record]]]:
        return {split: iter(records) for split, records in self._splits.items()}

    def _generate_examples(self) -> Iterator[tuple[str, Record]]:
        raise AssertionError("each split brings its own records")


def write(
    name: str,
    root: epath.Path,
    *,
    description: str,
    features: Mapping[str, Any],
    licence: str,
    splits: Mapping[str, Keyed],
) -> epath.Path:
    """Write the records of each split under `root` (local); returns the directory.

    `features` are TFDS features by field. An image is given as encoded bytes in a file object:
    given an array, TFDS would encode it with TensorFlow.
    """
    facts = {
        "description": description,
        "features": tfds.features.FeaturesDict(features),
        "license": licence,
    }
    builder = _Builder(name, root, facts, splits)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return epath.Path(builder.data_dir)


def audio(length: int | None = None) -> Any:
    """Return the feature of a sound: int16 `[length]`, of any length where it is None.

    As bytes, since TFDS would else spend ten bytes on each negative number.
    """
    return tfds.features.Tensor(shape=(length,), dtype=np.int16, encoding="bytes")


def check_splits(counts: Mapping[str, int], limit: int | None) -> None:
    """Raise `UserError` if a small build would leave a split empty."""
    if empty := [split for split, count in counts.items() if not count]:
        raise UserError(f"With limit={limit} the split '{empty[0]}' would be empty: take more.")
