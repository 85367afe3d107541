"""A folder of ArrayRecord files whose records are `tf.train.Example` messages."""

from __future__ import annotations

import bisect
import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from mmjax.core.config import FREE
from mmjax.core.errors import UserError
from mmjax.data.identity import identity, sample
from mmjax.sources.base import Example, Examples, Source

MANIFEST = "manifest.json"
_THREADS = 16
_TRIES = 1000
_SHARD = re.compile(r"(.*-)(\d+)(-of-)(\d+)(.*)")
_MAX_SHARDS = 10**6


@dataclass(frozen=True)
class ArrayRecord(Source):
    """All records of the files in `path` that match `glob`, in order of file name.

    Attributes:
      path: a folder.
      glob: which of its files; its stem is the label of results.
      partial: read the files that are there although others are missing: of those that `manifest.json` names, or of
        the N in `NAME-00000-of-N`.
    """

    path: str
    glob: str = "*.array_record*"
    partial: bool = field(default=False, metadata=FREE)

    @property
    def label(self) -> str:
        return self.glob.split(".")[0].strip("*-_") or epath.Path(self.path).name

    def open(self) -> Examples:
        return ArrayRecordExamples(self)


class ArrayRecordExamples(Examples):
    """Features of one value come as that value (bytes, float, int), longer ones as NumPy arrays or lists.

    A damaged record raises a `ValueError` that names its file and its place there; the others still read.
    """

    def __init__(self, source: ArrayRecord):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        folder = epath.Path(source.path).expanduser()
        files = sorted(folder.glob(source.glob)) if folder.is_dir() else []
        if not files:
            raise UserError(
                f"No ArrayRecord files '{source.glob}' in '{source.path}'.{_deeper(folder)}"
            )
        manifest = _manifest(folder)
        if not source.partial:
            _check_all_there(source, files, manifest)
        counts = _counts(files)
        if not sum(counts):
            raise UserError(
                f"The ArrayRecord files '{source.glob}' in '{source.path}' hold no records."
            )
        self._names = [file.name for file in files]
        self._ends = list(itertools.accumulate(counts))
        # Given its range, a file is not opened again to be counted.
        ranges = [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True) if count]
        self._data = ArrayRecordDataSource(ranges)
        self.description = f"{source.path}/{source.glob}"
        # Files grow by whole blocks, so a length alone does not show one record more or less.
        sizes = [[f.name, f.stat().length, n] for f, n in zip(files, counts, strict=True)]
        facts = hashlib.sha256(json.dumps([sizes, manifest.get("digest")]).encode()).hexdigest()
        self.identity = identity(facts, sample(sum(counts), self._data.__getitem__))
        self.fields = tuple(sorted(manifest.get("fields") or self._first()))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.description} has {len(self)} records; no record {index}.")
        try:
            return _decode(self._data[index])
        except Exception as error:  # any error of a reader on damaged bytes
            file = bisect.bisect_right(self._ends, index)
            record = index - (self._ends[file - 1] if file else 0)
            raise ValueError(f"{self._names[file]}, record {record}: {error}") from error

    def _first(self) -> Example:
        """Return the first example that can be read."""
        for index in range(min(len(self), _TRIES)):
            try:
                return self[index]
            except ValueError as error:
                last = error
        raise UserError(
            f"None of the first {min(len(self), _TRIES)} records of {self.description} could be read. "
            f"The last: {last}"
        )


def _counts(files: Sequence[epath.Path]) -> list[int]:
    """Return the number of records of each file; raise `UserError` for a file that is cut off or not an ArrayRecord."""
    with ThreadPoolExecutor(min(len(files), _THREADS)) as pool:
        counts = list(pool.map(_count, files))
    broken = [(file, fault) for file, (_, fault) in zip(files, counts, strict=True) if fault]
    if broken:
        file, fault = broken[0]
        raise UserError(
            f"{len(broken)} of {len(files)} ArrayRecord files cannot be opened, {file} among them "
            f"({fault}): cut off, damaged at the end, of another format or not on a local disk. "
            "Copy or convert again."
        )
    return [records for records, _ in counts]


def _count(file: epath.Path) -> tuple[int, str]:
    """Return the number of records of a file, and why it cannot be opened."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    records = int(reader.num_records())  # 0 where the file is damaged: only closing shows it
    try:
        reader.close()
    except RuntimeError as error:
        return 0, str(error).split(";")[0] or "no reason given"
    return records, ""


def _manifest(folder: epath.Path) -> Mapping[str, Any]:
    """Return the manifest that `mmjax convert` wrote, or nothing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and "made_by" in manifest else {}


def _check_all_there(
    source: ArrayRecord, files: Sequence[epath.Path], manifest: Mapping[str, Any]
) -> None:
    there = {file.name for file in files}
    stated = {MANIFEST: list(manifest.get("files", {})), "numbering": _shards(sorted(there))}
    for by, names in stated.items():
        expected = [name for name in names if fnmatch.fnmatch(name, source.glob)]
        missing = [name for name in expected if name not in there]
        if missing:
            raise UserError(
                f"'{source.path}' lacks {len(missing)} of the {len(expected)} files that its {by} names, "
                f"{missing[0]} among them. Copy them again, or set the source's partial = true."
            )


def _shards(names: Sequence[str]) -> list[str]:
    """Return the names of all shards of the sets to which files called `NAME-00000-of-00004` belong."""
    shards: dict[str, None] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            begin, number, of, total, end = match.groups()
            if name not in shards:
                width, count = len(number), min(int(total), _MAX_SHARDS)
                shards |= dict.fromkeys(
                    f"{begin}{i:0{width}d}{of}{total}{end}" for i in range(count)
                )
    return list(shards)


def _deeper(folder: epath.Path) -> str:
    """Return a note on folders inside that do hold such files."""
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [f.name for f in inner if f.is_dir() and any(f.glob("*.array_record*"))]
    return (
        f" There are some in its folders {', '.join(folders)}: give one as path." if folders else ""
    )


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
