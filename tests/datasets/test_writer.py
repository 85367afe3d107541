"""Records written as a TFDS directory of ArrayRecord files, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from mmjax.core.errors import UserError
from mmjax.datasets import writer
from mmjax.datasets.build import VERSION

SOUNDS = {"a": np.array([0, 1, -1, 2**15 - 1, -(2**15)], np.int16), "b": np.zeros(0, np.int16)}


def write(root: Path, splits: dict[str, Any]) -> epath.Path:
    features = {"word": tfds.features.Text(), "sound": writer.audio()}
    return writer.write(
        "made", epath.Path(root), description="A test.", features=features, licence="CC0", splits=splits
    )  # fmt: skip


def test_records_of_each_split_come_back_as_they_were(tmp_path: Path) -> None:
    records = [(key, {"word": key, "sound": sound}) for key, sound in SOUNDS.items()]
    path = write(tmp_path, {"train": records, "test": records[:1]})
    assert path == epath.Path(tmp_path) / "made" / VERSION
    builder = tfds.builder_from_directory(path)
    source = builder.as_data_source()
    assert {split: len(source[split]) for split in source} == {"train": 2, "test": 1}
    read = {x["word"].decode(): x["sound"] for x in (source["train"][i] for i in range(2))}
    assert read.keys() == SOUNDS.keys()
    for key, sound in SOUNDS.items():
        assert read[key].dtype == np.int16
        np.testing.assert_array_equal(read[key], sound)
    assert builder.info.redistribution_info.license == "CC0"


def test_keys_alone_fix_the_order(tmp_path: Path) -> None:
    records = [(f"{i}", {"word": f"{i}", "sound": SOUNDS["b"]}) for i in range(9)]
    orders = []
    for name, keyed in (("one", records), ("two", records[::-1])):
        path = write(tmp_path / name, {"train": keyed})
        source = tfds.builder_from_directory(path).as_data_source(split="train")
        orders.append([source[i]["word"] for i in range(9)])
    assert orders[0] == orders[1] and len(set(orders[0])) == 9


def test_a_sound_of_a_fixed_length_has_its_shape() -> None:
    assert writer.audio(8).shape == (8,) and writer.audio().shape == (None,)


def test_a_limit_that_empties_a_split_is_refused() -> None:
    writer.check_splits({"train": 3, "test": 1}, limit=4)
    with pytest.raises(UserError, match="With limit=4 the split 'test' would be empty"):
        writer.check_splits({"train": 4, "test": 0}, limit=4)
