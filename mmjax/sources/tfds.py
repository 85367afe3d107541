"""Any TFDS data set that is built as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import pkgutil
from dataclasses import dataclass
from typing import Any

from etils import epath

import mmjax.data
from mmjax.data import build, data_dir
from mmjax.errors import UserError, nearest
from mmjax.source import Example, Examples, Source


@dataclass(frozen=True)
class Tfds(Source):
    """A split of a TFDS data set.

    Attributes:
      dataset: its name, as `name`, `name/version` or `name/config/version` under `folder`.
      split: a split, with TFDS slicing (`train[:90%]`).
      folder: the data folder; empty for `$MMJAX_DATA_DIR` or mmjax's own.
    """

    dataset: str
    split: str
    folder: str = ""

    @property
    def label(self) -> str:
        return self.split

    def open(self) -> Examples:
        return TfdsExamples(self)


class TfdsExamples(Examples):
    """Examples as the data set's features decode them (images as uint8 arrays, texts as str)."""

    def __init__(self, source: Tfds):
        builder = _builder(source)
        split = source.split.split("[")[0]
        if split not in builder.info.splits:
            splits = list(builder.info.splits)
            raise UserError(
                f"data set '{source.dataset}' has no split '{split}'.{nearest(split, splits)}"
            )
        self._texts = _text_fields(builder.info.features)
        self._data = builder.as_data_source(split=source.split)
        self.description = f"{builder.info.full_name}:{source.split}"
        self.fields = tuple(builder.info.features)
        self.identity = _identity(builder, source.split)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        example = dict(self._data[index])
        for name in self._texts:
            example[name] = example[name].decode("utf-8")
        return example


def _text_fields(features: Any) -> list[str]:
    return [n for n, f in features.items() if type(f).__name__ == "Text"]


def _builder(source: Tfds) -> Any:
    import tensorflow_datasets as tfds

    root = epath.Path(source.folder) if source.folder else data_dir()
    name = source.dataset.split("/")[0]
    if name in own_data_sets():
        return tfds.builder_from_directory(build.find(name, root).path)
    path = _version_folder(root / source.dataset)
    if path is None:
        raise UserError(
            f"Data set '{source.dataset}' is not built under {root}. "
            f"Run: tfds build {name} --file_format=array_record --data_dir={root}"
        )
    return tfds.builder_from_directory(path)


def own_data_sets() -> list[str]:
    """Names that `python -m mmjax.data.build` may know: the modules beside it."""
    return [m.name for m in pkgutil.iter_modules(mmjax.data.__path__)]


def _version_folder(path: epath.Path) -> epath.Path | None:
    """The folder that holds `dataset_info.json`: `path` itself or its newest version."""
    if (path / "dataset_info.json").exists():
        return path
    if not path.exists():
        return None
    found = [p for p in path.iterdir() if p.is_dir() and (p / "dataset_info.json").exists()]
    return max(
        found,
        key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")],
        default=None,
    )


def _identity(builder: Any, split: str) -> str:
    """Digest of name, version, split sizes and, where the builder wrote one, the manifest of contents."""
    infos = {name: [list(s.shard_lengths), s.num_bytes] for name, s in builder.info.splits.items()}
    manifest = epath.Path(builder.data_dir) / "manifest.json"
    content = json.loads(manifest.read_text()).get("digest") if manifest.exists() else None
    whole = json.dumps([builder.info.full_name, split, infos, content], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
