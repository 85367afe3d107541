"""tf.data, WebDataset and a PyTorch DataLoader reading pictures and texts; the peers of `inputs.py`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmjax.modalities.text import Text, TextInput

LENGTH = 16
TOKENIZER = "emoji/1.0.0/tokenizer.model"
AHEAD = 4  # batches that are made ahead, by all
WORKERS = os.cpu_count() or 1
SHUFFLE = 256


@dataclass(frozen=True)
class View:
    """Settings of a picture: `crop` is the least area of a box, as in `mmjax.modalities.image`."""

    size: int
    crop: float
    flip: bool


class Batch(NamedTuple):
    """Pictures uint8 `[B, size, size, 3]`, tokens int32 `[B, LENGTH]`."""

    pictures: np.ndarray
    tokens: np.ndarray


@cache
def _text() -> Text:
    return Text(tokenizer=TOKENIZER)


def text_of(example: Mapping[str, Any]) -> str:
    """Return the caption of an example of the emoji data set."""
    return _text().raw(example["caption"])


def tokens_of(text: str) -> np.ndarray:
    made = _text().preprocess(TextInput(length=LENGTH), text, None)
    return np.asarray(made["ids"], np.int32)


def picture_of(encoded: bytes, view: View, rng: np.random.Generator) -> np.ndarray:
    """Return a picture as Pillow makes it: decoded, cropped and scaled, mirrored."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    box = None
    if view.crop < 1:
        width, height = (side * np.sqrt(rng.uniform(view.crop, 1)) for side in image.size)
        left, top = rng.uniform(0, image.size[0] - width), rng.uniform(0, image.size[1] - height)
        box = (left, top, left + width, top + height)
    if box is not None or image.size != (view.size, view.size):
        image = image.resize((view.size, view.size), Image.Resampling.BILINEAR, box)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if view.flip and rng.random() < 0.5 else pixels


# --- PyTorch -----------------------------------------------------------------------------------


class Files:
    """A PyTorch data set of the files of a folder."""

    def __init__(self, folder: Path, view: View):
        self.stems = sorted(p.with_suffix("") for p in folder.glob("*.jpg"))
        self.view = view

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        stem = self.stems[index]
        rng = np.random.default_rng()
        picture = picture_of(stem.with_suffix(".jpg").read_bytes(), self.view, rng)
        return picture, tokens_of(stem.with_suffix(".txt").read_text())


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    return Batch(*(np.stack(column) for column in zip(*rows, strict=True)))


def as_is(batch: Batch) -> Batch:
    """Return what PyTorch's loader would otherwise turn into tensors."""
    return batch


def data_loader(path: Path, view: View, batch: int) -> Iterator[Batch]:
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        Files(path / "files", view),  # type: ignore[arg-type]
        batch, shuffle=True, num_workers=WORKERS, collate_fn=collate, drop_last=True, persistent_workers=True,
        prefetch_factor=max(1, AHEAD // WORKERS), multiprocessing_context="spawn",
    )  # fmt: skip
    while True:
        yield from loader


# --- WebDataset --------------------------------------------------------------------------------


class Decode:
    """A member of a tar as a row; a class, so that a worker can be given it."""

    def __init__(self, view: View):
        self.view = view

    def __call__(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        picture = picture_of(sample["jpg"], self.view, np.random.default_rng())
        return picture, tokens_of(sample["txt"].decode())


def web_dataset(path: Path, view: View, batch: int) -> Iterator[Batch]:
    import webdataset as wds

    urls = sorted(str(p) for p in (path / "tars").glob("*.tar"))
    data = wds.WebDataset(urls, shardshuffle=len(urls), workersplitter=wds.split_by_worker)
    data = data.shuffle(SHUFFLE).map(Decode(view)).batched(batch, collation_fn=collate)
    loader: Any = wds.WebLoader(
        data, batch_size=None, num_workers=WORKERS, collate_fn=as_is, persistent_workers=True,
        prefetch_factor=max(1, AHEAD // WORKERS), multiprocessing_context="spawn",
    )  # fmt: skip
    while True:
        yield from loader


# --- tf.data -----------------------------------------------------------------------------------


def write_tfrecords(folder: Path, rows: Sequence[tuple[str, bytes, str]], shards: int) -> None:
    import tensorflow as tf

    writers = [tf.io.TFRecordWriter(str(folder / f"{i}.tfrecord")) for i in range(shards)]
    for index, (_, encoded, text) in enumerate(rows):
        values = {"image": encoded, "caption": text.encode()}
        features = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
            for name, value in values.items()
        }
        example = tf.train.Example(features=tf.train.Features(feature=features))
        writers[index % shards].write(example.SerializeToString())
    for writer in writers:
        writer.close()


def tf_data(path: Path, view: View, batch: int) -> Iterator[Batch]:
    import tensorflow as tf

    form = {name: tf.io.FixedLenFeature((), tf.string) for name in ("image", "caption")}

    def row(record: Any) -> Any:
        example = tf.io.parse_single_example(record, form)
        image = tf.io.decode_image(example["image"], channels=3, expand_animations=False)
        side = tf.cast(tf.shape(image)[0], tf.float32)
        if view.crop < 1:
            part = side * tf.sqrt(tf.random.uniform((), view.crop, 1))
            corner = tf.cast(tf.random.uniform((2,), 0, side - part), tf.int32)
            size = tf.cast(part, tf.int32)
            image = tf.image.crop_to_bounding_box(image, corner[0], corner[1], size, size)
        image = tf.image.resize(image, (view.size, view.size), "bilinear", antialias=True)
        if view.flip:
            image = tf.image.random_flip_left_right(image)
        tokens = tf.numpy_function(lambda x: tokens_of(x.decode()), [example["caption"]], tf.int32)
        return tf.cast(tf.round(image), tf.uint8), tf.ensure_shape(tokens, (LENGTH,))

    options = tf.data.Options()
    options.threading.private_threadpool_size = WORKERS
    files = tf.data.Dataset.list_files(str(path / "tfrecords" / "*.tfrecord"), shuffle=True)
    data = files.interleave(tf.data.TFRecordDataset, num_parallel_calls=WORKERS)
    data = data.shuffle(SHUFFLE).map(row, num_parallel_calls=WORKERS)
    data = data.batch(batch, drop_remainder=True).repeat().prefetch(AHEAD).with_options(options)
    for pictures, tokens in data.as_numpy_iterator():
        yield Batch(pictures, tokens)
