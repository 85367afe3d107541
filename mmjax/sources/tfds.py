"""Any TFDS data set that is built as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from etils import epath

import mmjax.datasets
from mmjax.core.config import FREE
from mmjax.core.errors import UserError, nearest
from mmjax.data import data_dir, pictures
from mmjax.data.identity import identity, sample
from mmjax.datasets import build
from mmjax.sources.base import Example, Examples, Source

FEATURES = "features.json"
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_PLAIN = {1: "L", 3: "RGB", 4: "RGBA"}
"""Modes that TFDS and mmjax decode alike, by their channels."""


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
    folder: str = field(default="", metadata=FREE)

    @property
    def label(self) -> str:
        return self.split

    def open(self) -> Examples:
        return TfdsExamples(self)


class TfdsExamples(Examples):
    """Examples as the data set's features decode them (images as uint8 arrays, texts as str)."""

    def __init__(self, source: Tfds):
        builder = _builder(source)
        split = _split(builder, source)
        for feature in _pictures(builder.info.features):
            feature.decode_example_np = partial(_decode_picture, feature)
        self._texts = _text_fields(builder.info.features)
        self.labels = _class_names(builder.info.features)
        self._data = builder.as_data_source(split=source.split)
        self.description = f"{builder.info.full_name}:{source.split}"
        self.fields = tuple(sorted(builder.info.features))
        manifest = _manifest(builder)
        self.credits = tuple(s["attribution"] for s in manifest.get("sources", ()))
        _check_files(source, builder, split)
        records = sample(len(self._data), self._data.data_source.__getitem__)
        self.identity = identity(_facts(builder, source.split, manifest), records)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        example = dict(self._data[index])
        for name in self._texts:
            example[name] = example[name].decode("utf-8")
        return example


def _pictures(feature: Any) -> Iterator[Any]:
    """Yield the features of encoded pictures within `feature`."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        yield feature
    elif hasattr(feature, "items"):
        for _, inner in feature.items():
            yield from _pictures(inner)
    elif hasattr(feature, "feature"):
        yield from _pictures(feature.feature)


def _decode_picture(feature: Any, data: bytes) -> np.ndarray:
    """Return what TFDS decodes by PIL, `[H, W, channels]`, opened as mmjax opens pictures.

    TFDS itself would try every format that Pillow knows, and would take OpenCV where that is installed.
    """
    image = pictures.upright(pictures.open_picture(data))
    channels = feature.shape[-1]
    if feature.np_dtype == np.uint16 and image.mode.startswith("I;16"):
        return np.asarray(image)[..., None]
    is_mask = channels == 1 and image.mode in ("1", "P")  # its values are classes, not colours
    if not is_mask and image.mode not in _PLAIN.values():
        image = pictures.rgb(image)
        image = image.convert(_PLAIN.get(channels, image.mode))
    array = np.asarray(image, np.uint8)
    if array.ndim == 2:
        array = np.repeat(array[..., None], channels or 1, axis=-1)
    # TFDS stores a float32 as the four bytes of a pixel.
    return array.view(np.float32) if feature.np_dtype == np.float32 else array


def _text_fields(features: Any) -> list[str]:
    return [n for n, f in features.items() if type(f).__name__ == "Text"]


def _class_names(features: Any) -> dict[str, list[str]]:
    """Return the names of the fields that are classes; where a data set gives no names, TFDS has their numbers."""
    classes = {n: list(getattr(f, "names", None) or ()) for n, f in features.items()}
    numbers = {n: [str(i) for i in range(len(names))] for n, names in classes.items()}
    return {n: names for n, names in classes.items() if names != numbers[n]}


def _root(source: Tfds) -> epath.Path:
    return epath.Path(source.folder).expanduser() if source.folder else data_dir()


def _how_to_build(source: Tfds) -> str:
    name = source.dataset.split("/")[0]
    return f"Run: tfds build {name} --file_format=array_record --data_dir={_root(source)}"


def _builder(source: Tfds) -> Any:
    import tensorflow_datasets as tfds

    logging.getLogger("absl").addFilter(_is_asked_for)
    root = _root(source)
    name = source.dataset.split("/")[0]
    if name in own_data_sets():
        built = build.find(name, root)
        _check_classes(source, built.path)
        return tfds.builder_from_directory(built.path)
    path = _version_folder(root / source.dataset)
    if path is None:
        raise UserError(
            f"Data set '{source.dataset}' is not built under {root}.{_others(root / name, name)} "
            f"{_how_to_build(source)}"
        )
    _check_classes(source, path)
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:
        # Whatever TFDS raises for a folder whose descriptions are cut, gone or of another version.
        raise UserError(
            f"Data set '{source.dataset}' in {path} is half-built: {_first_line(error)}. {_how_to_build(source)}"
        ) from error
    if builder.info.file_format.value != "array_record":
        raise UserError(
            f"Data set '{source.dataset}' in {path} is built as {builder.info.file_format.value}; mmjax reads "
            f"array_record, by which examples are read at random. {_how_to_build(source)}"
        )
    return builder


def _check_classes(source: Tfds, path: epath.Path) -> None:
    """Refuse a data set whose features are classes outside of TFDS: TFDS would import, and so run, their modules."""
    try:
        features = json.loads((path / FEATURES).read_text())
    except (FileNotFoundError, ValueError):
        return  # TFDS's message names what is missing
    for name in _class_names_in(features):
        if not name.startswith("tensorflow_datasets."):
            raise UserError(
                f"Data set '{source.dataset}' in {path}: {FEATURES} names the class '{name}', which is none of "
                "tensorflow_datasets. mmjax runs no code that data name. Build the data set with the features of "
                "tfds.features."
            )


def _class_names_in(features: Any) -> Iterator[str]:
    """Yield the names of classes in a description of features, also in that of TFDS before 4.3."""
    if isinstance(features, list):
        for part in features:
            yield from _class_names_in(part)
    if not isinstance(features, dict):
        return
    for key, value in features.items():
        if key in _CLASS_KEYS and isinstance(value, str):
            yield value
        elif key == "json" and isinstance(value, str):
            with contextlib.suppress(ValueError):
                yield from _class_names_in(json.loads(value))
        else:
            yield from _class_names_in(value)


def _is_asked_for(record: logging.LogRecord) -> bool:
    """Filter out advice to install OpenCV: a PNG has the same pixels by PIL, which mmjax asks for anyway."""
    return not str(record.msg).startswith("OpenCV is not installed")


def _others(path: epath.Path, name: str) -> str:
    """Return a note on the other configs or versions of a data set."""
    there = sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    return f" There is {', '.join(f'{name}/{t}' for t in there)}." if there else ""


def _split(builder: Any, source: Tfds) -> Any:
    """Return the split, a part of one, or a sum of several; `UserError` where there is no such, or it is empty."""
    known = list(builder.info.splits)
    for name in (part.split("[")[0] for part in source.split.split("+")):
        if name not in known:
            raise UserError(
                f"data set '{source.dataset}' has no split '{name}'.{nearest(name, known)}"
            )
    try:
        split = builder.info.splits[source.split]
    except ValueError as error:
        raise UserError(
            f"data set '{source.dataset}': split '{source.split}': {_first_line(error)}."
        ) from error
    if not split.num_examples:
        raise UserError(f"data set '{source.dataset}': split '{source.split}' has no examples.")
    return split


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def _check_files(source: Tfds, builder: Any, split: Any) -> None:
    missing = [path for path in split.filepaths if not epath.Path(path).exists()]
    if missing:
        raise UserError(
            f"Data set '{source.dataset}' in {builder.data_dir} is half-built: it lacks "
            f"{epath.Path(missing[0]).name}. {_how_to_build(source)}"
        )


def own_data_sets() -> list[str]:
    """Return the names that `mmjax build` may know: the modules of `mmjax.datasets`."""
    return [m.name for m in pkgutil.iter_modules(mmjax.datasets.__path__)]


def _version_folder(path: epath.Path) -> epath.Path | None:
    """Return the folder that holds `dataset_info.json`: `path` itself or its newest version."""
    if (path / "dataset_info.json").exists():
        return path
    if not path.exists():
        return None
    versions = [p for p in path.iterdir() if p.is_dir() and (p / "dataset_info.json").exists()]
    return max(
        versions,
        key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")],
        default=None,
    )


def _manifest(builder: Any) -> dict[str, Any]:
    """Return the manifest that mmjax's own builders wrote for a data set; empty for others."""
    path = epath.Path(builder.data_dir) / build.MANIFEST
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _facts(builder: Any, split: str, manifest: Mapping[str, Any]) -> str:
    """Return a digest of name, version, split sizes and, where there is a manifest, its digest of the contents."""
    infos = {name: [list(s.shard_lengths), s.num_bytes] for name, s in builder.info.splits.items()}
    parts = [builder.info.full_name, split, infos, manifest.get("digest")]
    whole = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()
