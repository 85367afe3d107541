"""Examples per second of the loader against tf.data, WebDataset and a PyTorch DataLoader, on the same bytes and cores.

Two data sets of a picture and its text: `small`, 64 px PNG as the quickstart reads them (crop of 0.7 and more,
mirrored); `large`, 288 px JPEG, cropped to 224 px. Each is made from the emoji data set as tars, and from these as
ArrayRecord by `mmjax convert`, as TFRecord, and as files. All decode, crop by the same law, scale by bilinear
filters with support, tokenise with the same SentencePiece model, shuffle and make batches of uint8 pictures and int32
tokens; workers are as many as cores. A peer is skipped if its package is not installed. Asserted: without crops, an
epoch of each has the same texts, as often, with the same pictures (to a few grey levels, as decoders differ).

Rates are of batches that come when what was read ahead is used up. The config is not read.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import _inputs_peers as others
from benchmarks._inputs_peers import Batch, View
from benchmarks._pairs import Effort, Quantity, quantity
from benchmarks._steps import Steps
from mmjax.convert.convert import convert
from mmjax.core.config import Block
from mmjax.sources.tfds import Tfds

EXAMPLES = 2048
BATCH = 64
BATCHES = 16  # that are timed in a round
STOCK = 12  # what any of them has read ahead at most, in batches, with what its processes are about
SHARDS = 4
OURS = "mmjax"
TASK = "pairs"


@dataclass(frozen=True)
class Kind:
    """A data set: how pictures are stored, and what is made of them."""

    side: int
    format: str
    view: View


KINDS: Mapping[str, Kind] = {
    "small, 64 px PNG": Kind(64, "PNG", View(64, 0.7, True)),
    "large, 288 px JPEG": Kind(288, "JPEG", View(224, 0.7, True)),
}


def measure(effort: Effort) -> list[Quantity]:
    """Return rates, and ratios of ours to each peer."""
    result = []
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            make_data(path, kind)
            assert_equal(path, kind)
            rates = _rates(path, kind, effort.pairs)
        for peer, values in rates.items():
            if peer != OURS:
                ratio = [a / b for a, b in zip(rates[OURS], values, strict=True)]
                result.append(quantity(f"{name}: {OURS} to {peer}", ratio, wanted="above 1"))
        result += [quantity(f"{name}: {n}", v, "examples/s") for n, v in rates.items()]
    return result


def _rates(path: Path, kind: Kind, pairs: int) -> dict[str, list[float]]:
    """Return, by loader, the examples per second of each round; each reads on where it was."""
    streams = {name: make(path, kind.view) for name, make in loaders().items()}
    rates: dict[str, list[float]] = {name: [] for name in streams}
    for pair in range(pairs):
        names = list(streams)
        at = pair % len(names)
        for name in names[at:] + names[:at]:
            for _ in range(STOCK):
                next(streams[name])
            began = time.perf_counter()
            for _ in range(BATCHES):
                next(streams[name])
            rates[name].append(BATCHES * BATCH / (time.perf_counter() - began))
    for stream in streams.values():
        stream.close()
    return rates


def loaders() -> dict[str, Callable[[Path, View], Iterator[Batch]]]:
    """Return the loaders whose packages are there; each gives batches without end."""
    result: dict[str, Callable[[Path, View], Any]] = {OURS: mmjax_loader}
    for package, name, loader in (
        ("tensorflow", "tf.data", others.tf_data),
        ("webdataset", "WebDataset", others.web_dataset),
        ("torch", "DataLoader", others.data_loader),
    ):
        if find_spec(package) is not None:
            result[name] = lambda path, view, loader=loader: loader(path, view, BATCH)
    return result


# --- the data ----------------------------------------------------------------------------------


def make_data(path: Path, kind: Kind) -> None:
    """Write `tars`, `records` (ArrayRecord), `tfrecords` where TensorFlow is there, `files`."""
    for name in ("tars", "files"):
        (path / name).mkdir()
    rows = list(examples(kind))
    for shard in range(SHARDS):
        with tarfile.open(path / "tars" / f"pairs-{shard}.tar", "w") as tar:
            for key, encoded, text in rows[shard::SHARDS]:
                for extension, content in (("jpg", encoded), ("txt", text.encode())):
                    (path / "files" / f"{key}.{extension}").write_bytes(content)
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    fields = {"image": ("jpg",), "caption": ("txt",), "key": ("__key__",)}
    convert([str(path / "tars" / "*.tar")], path / "records", shards=SHARDS, fields=fields)
    if find_spec("tensorflow") is not None:
        (path / "tfrecords").mkdir()
        others.write_tfrecords(path / "tfrecords", rows, SHARDS)


def examples(kind: Kind) -> Iterator[tuple[str, bytes, str]]:
    """Yield key, encoded picture and text; of the emoji data set, from its beginning again where it ends."""
    source = Tfds(dataset="emoji", split="train").open()
    for index in range(EXAMPLES):
        example = source[index % len(source)]
        picture = Image.fromarray(np.asarray(example["image"])[..., :4]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture).convert("RGB").resize((kind.side, kind.side))
        out = io.BytesIO()
        flat.save(out, kind.format, **({"quality": 90} if kind.format == "JPEG" else {}))
        yield f"{index:06d}", out.getvalue(), others.text_of(example)


# --- ours --------------------------------------------------------------------------------------


def mmjax_loader(path: Path, view: View) -> Iterator[Batch]:
    """Yield the real loader, of a model that is never trained."""
    steps = Steps(block(path, view))
    with steps.loader(0, 1_000_000) as loader:
        for batch in loader:
            inputs = batch.rows.inputs
            yield Batch(inputs["image"]["pixels"], inputs["text"]["ids"])


def block(path: Path, view: View) -> Block:
    layer = {"name": "transformer", "num_heads": 1, "mlp_dim": 8}
    task = {
        "source": {"name": "array_record", "path": str(path / "records")},
        "inputs": {
            "image": {"size": view.size, "crop": view.crop, "flip": view.flip},
            "text": {"field": "caption", "length": others.LENGTH},
        },
        "objective": {"name": "contrastive", "modalities": ["image", "text"], "embed_dim": 8},
        "batch": BATCH,
    }
    return {
        "steps": 1_000_000,
        "modalities": {
            "image": {"name": "image", "patch": 32, "max_positions": view.size // 32},
            "text": {"name": "text", "tokenizer": others.TOKENIZER, "max_positions": others.LENGTH},
        },
        "model": {"width": 8, "layers": [{"repeat": 1, "blocks": [layer]}]},
        "tasks": {TASK: task},
        "loader": {"processes": others.WORKERS, "prefetch": others.AHEAD, "cache_mib": 0},
        "evaluation": {"every": 0},
    }


# --- do they give the same? --------------------------------------------------------------------


def assert_equal(path: Path, kind: Kind) -> None:
    """Check that all see every example in an epoch; without crops, as the same picture and tokens."""
    view = View(kind.view.size, 1.0, False)
    seen = {name: _epoch(make(path, view)) for name, make in loaders().items()}
    for name, rows in seen.items():
        assert rows.keys() == seen[OURS].keys(), f"{name} reads other texts"
        for ids, pictures in rows.items():
            assert len(pictures) == len(seen[OURS][ids]), f"{name} reads some examples more often"
            for theirs in pictures:  # several pictures have one text
                off = min(np.abs(theirs.astype(float) - own).mean() for own in seen[OURS][ids])
                assert off < 3, f"{name}: pictures differ by {off:.1f} grey levels"


def _epoch(stream: Iterator[Batch]) -> dict[tuple[int, ...], list[np.ndarray]]:
    """Return, by tokens, the pictures of an epoch, thinned out."""
    result: dict[tuple[int, ...], list[np.ndarray]] = {}
    for batch in itertools.islice(stream, EXAMPLES // BATCH):
        for picture, ids in zip(batch.pictures, batch.tokens, strict=True):
            step = max(1, len(picture) // 16)
            result.setdefault(tuple(map(int, ids)), []).append(picture[::step, ::step].copy())
    getattr(stream, "close", lambda: None)()
    return result
