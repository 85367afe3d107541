"""A folder of ArrayRecord files whose records are `tf.train.Example` messages."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from mmjax.errors import UserError
from mmjax.source import Example, Examples, Source


@dataclass(frozen=True)
class ArrayRecord(Source):
    """All records of the files in `path` that match `glob`, in order of file name.

    Attributes:
      path: a folder.
      glob: which of its files; its stem is the label of results.
    """

    path: str
    glob: str = "*.array_record*"

    @property
    def label(self) -> str:
        return self.glob.split(".")[0].strip("*-_") or epath.Path(self.path).name

    def open(self) -> Examples:
        return ArrayRecordExamples(self)


class ArrayRecordExamples(Examples):
    """Features of one value come as that value (bytes, float, int), longer ones as NumPy arrays or lists."""

    def __init__(self, source: ArrayRecord):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        folder = epath.Path(source.path)
        files = sorted(str(f) for f in folder.glob(source.glob)) if folder.exists() else []
        if not files:
            raise UserError(f"No ArrayRecord files '{source.glob}' in '{source.path}'.")
        self._data = ArrayRecordDataSource(files)
        if not len(self._data):
            raise UserError(
                f"The ArrayRecord files '{source.glob}' in '{source.path}' hold no records."
            )
        self.description = f"{source.path}/{source.glob}"
        sizes = [[epath.Path(f).name, epath.Path(f).stat().length] for f in files]
        self.identity = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
        self.fields = tuple(sorted(self[0]))

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        return _decode(self._data.__getitems__([index])[0])


def _decode(record: bytes) -> dict[str, Any]:
    from tensorflow_datasets.proto import tf_example_pb2 as pb

    message = pb.Example.FromString(record)
    return {name: _values(feature) for name, feature in message.features.feature.items()}


def _values(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    if kind is None:
        return b""
    values = getattr(feature, kind).value
    if len(values) == 1:
        return values[0]
    if kind == "bytes_list":
        return list(values)
    return np.array(values, np.float32 if kind == "float_list" else np.int64)
