"""Archives, tables and folders to convert, and what is read back."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from PIL import Image as Pil

from mmjax.convert.convert import Converted
from mmjax.core.errors import UserError
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.sources.array_record import ArrayRecord
from mmjax.sources.base import Example, Examples
from mmjax.task import RowSpec

COUNT = 30


Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members, **more: Any) -> Path:
    with tarfile.open(path, "w", **more) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(examples: Sequence[Example], first: int = 0) -> list[tuple[str, bytes]]:
    result = []
    for index, example in enumerate(examples, first):
        facts = json.dumps({"vendor": example["vendor"]}).encode()
        parts = {"png": example["image"], "txt": example["caption"], "json": facts}
        parts["cls"] = str(example["group"]).encode()
        result += [(f"part/{index:04d}.{name}", part) for name, part in parts.items()]
    return result


def open_(path: Path | epath.Path) -> Examples:
    return ArrayRecord(str(path)).open()


def spec(image: str, text: str, fields: tuple[str, ...] = ()) -> RowSpec:
    inputs = {
        "image": Input("image", Image(), ImageInput(field=image, size=32)),
        "text": Input(
            "text", Text(tokenizer="emoji/1.0.0/tokenizer.model"), TextInput(field=text, length=8)
        ),
    }
    return RowSpec(inputs, fields)


def assert_same_rows(found: Any, expected: Any) -> None:
    pixels = found.inputs["image"]["pixels"]
    assert pixels.any() and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected.inputs["image"]["pixels"])
    ids = found.inputs["text"]["ids"]
    assert ids.any()
    np.testing.assert_array_equal(ids, expected.inputs["text"]["ids"])


def says(words: str, make: Callable[[], Any]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert words in str(caught.value), str(caught.value)


def png(size: int = 4) -> bytes:
    out = io.BytesIO()
    Pil.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).save(
        out, "PNG"
    )
    return out.getvalue()


def jpeg(image: bytes) -> bytes:
    out = io.BytesIO()
    Pil.open(io.BytesIO(image)).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def files(made: Converted) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in made.path.iterdir()}
