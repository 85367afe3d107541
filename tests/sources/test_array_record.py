"""A folder of ArrayRecord files of `tf.train.Example` messages, written here by the libraries themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tensorflow_datasets.proto import tf_feature_pb2 as pb

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.sources.array_record import ArrayRecord


def message(number: int) -> bytes:
    features = {
        "id": pb.Feature(int64_list=pb.Int64List(value=[number])),
        "size": pb.Feature(float_list=pb.FloatList(value=[number / 2])),
        "words": pb.Feature(bytes_list=pb.BytesList(value=[f"number {number}".encode()])),
        "wave": pb.Feature(float_list=pb.FloatList(value=np.arange(4) + number)),
        "tags": pb.Feature(int64_list=pb.Int64List(value=[number, -1])),
        "names": pb.Feature(bytes_list=pb.BytesList(value=[b"a", b"b"])),
        "nothing": pb.Feature(),
    }
    return tf_example_pb2.Example(features=pb.Features(feature=features)).SerializeToString()


def write(path: Path, *records: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-00000-of-00002.array_record", *(message(i) for i in range(3)))
    write(tmp_path / "train-00001-of-00002.array_record", *(message(i) for i in range(3, 5)))
    write(tmp_path / "test-00000-of-00001.array_record", message(100))
    return tmp_path


def opened(folder: Path, glob: str = "train*"):
    return ArrayRecord(str(folder), glob).open()


def test_records_come_in_order_of_file_name(folder):
    examples = opened(folder)
    assert len(examples) == 5
    assert [e["id"] for e in examples] == [0, 1, 2, 3, 4]
    assert [examples[i]["id"] for i in (4, 0, 3)] == [4, 0, 3]
    assert [e["id"] for e in opened(folder, "test*")] == [100]


def test_values_come_as_what_they_are(folder):
    example = opened(folder)[3]
    assert example["id"] == 3 and isinstance(example["id"], int)
    assert example["size"] == 1.5 and isinstance(example["size"], float)
    assert example["words"] == b"number 3"
    assert example["names"] == [b"a", b"b"] and example["nothing"] == b""
    np.testing.assert_array_equal(example["wave"], np.array([3, 4, 5, 6], np.float32))
    assert example["wave"].dtype == np.float32
    np.testing.assert_array_equal(example["tags"], [3, -1])
    assert example["tags"].dtype == np.int64


def test_fields_are_told(folder):
    assert set(opened(folder).fields) == {
        "id", "size", "words", "wave", "tags", "names", "nothing",
    }  # fmt: skip


def test_a_config_names_it(folder):
    block: dict[str, Any] = {"name": "array_record", "path": str(folder), "glob": "train*"}
    source = configs.component("sources", block, "tasks.a.source")
    assert len(source.open()) == 5 and source.label == "train"
    del block["glob"]
    assert len(configs.component("sources", block, "tasks.a.source").open()) == 6


def test_identity_is_of_the_files(folder, tmp_path_factory):
    there = opened(folder).identity
    other = tmp_path_factory.mktemp("other")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert opened(other).identity == there, "not of the place"
    assert opened(folder, "test*").identity != there
    write(other / "train-00001-of-00002.array_record", *(message(i) for i in range(3, 6)))
    assert opened(other).identity != there


@pytest.mark.parametrize(
    ("path", "glob"), [("{folder}", "val*"), ("{folder}/none", "*"), ("{folder}/test-00000-of-00001.array_record", "*")]
)  # fmt: skip
def test_no_files_names_folder_and_pattern(folder, path, glob):
    path = path.format(folder=folder)
    with pytest.raises(UserError, match=re.escape(f"No ArrayRecord files '{glob}' in '{path}'")):
        ArrayRecord(path, glob).open()


def test_files_without_records_are_refused(tmp_path):
    write(tmp_path / "train.array_record")
    with pytest.raises(UserError, match="hold no records"):
        opened(tmp_path)


def test_a_torn_file_is_refused_by_name(folder):
    file = folder / "train-00001-of-00002.array_record"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=file.name):
        opened(folder)
