"""Values that readers of other formats yield, and their checks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from mmjax.core.errors import UserError
from mmjax.data import pictures

KEY = "__key__"
"""Field with the stem of an example's files."""

IMAGES = frozenset("jpg jpeg png gif webp bmp tif tiff ppm pgm pbm pnm".split())
TEXTS = frozenset("txt text caption transcript".split())
INTEGERS = frozenset("cls cls2 class index inx count".split())

MAX_BYTES = 2**30
"""Of one example: a record is one protocol buffer, which ends at 2 GiB."""

MAX_FLOAT = 3.4028235e38

_NAMED = 20  # ignored files that the manifest names

Scalar = bytes | int | float
Value = Scalar | list[Scalar]
Raw = tuple[str, Any]


@dataclass
class Found:
    """One example as the source holds it.

    Attributes:
      where: file and place, for messages.
      raw: field -> (kind, data); `value_of` checks and decodes it.
      fault: why it cannot be used; empty if it can.
      size: bytes of its data so far.
    """

    where: str
    raw: dict[str, Raw] = field(default_factory=dict)
    fault: str = ""
    size: int = 0


@dataclass
class Ignored:
    """Files that belong to no example."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < _NAMED:
            self.names.append(repr(name))


def type_of(value: Value) -> str:
    """Return the type of a value, `bytes`, `int64` or `float32`: what a `tf.train.Example` can hold."""
    first = value[0] if isinstance(value, list) else value
    if isinstance(first, bytes):
        return "bytes"
    return "int64" if isinstance(first, int) else "float32"


TYPES = ("int", "float", "text")
"""Types that a field may be given by hand."""


def value_of(
    kind: str, data: Any, as_type: str = "", max_pixels: int = pictures.MAX_PIXELS
) -> Value | None:
    """Return the value to store, checked; None for an empty one, `ValueError` and others for a damaged one.

    `as_type` is one of `TYPES`, or empty for the type that the source gives.
    """
    if as_type and kind != "image":
        plain = _plain(data["bytes"] if kind == "file" else data)
        return None if plain is None else _as_type(plain, as_type)
    return _own_value(kind, data, max_pixels)


def _as_type(value: Value, as_type: str) -> Value:
    if isinstance(value, list):
        return [_as_type(item, as_type) for item in value]  # type: ignore[misc]
    text = value.decode("utf-8").strip() if isinstance(value, bytes) else repr(value)
    if as_type == "text":
        return value if isinstance(value, bytes) else text.encode()
    try:
        if as_type == "float":
            return _plain(float(text))  # type: ignore[return-value]
        whole = float(text) if "." in text or "e" in text.lower() else int(text)
        if int(whole) != whole:
            raise ValueError
        return _plain(int(whole))  # type: ignore[return-value]
    except (ValueError, OverflowError):
        raise ValueError(f"is {text[:40]!r}, no {as_type}") from None


def _own_value(kind: str, data: Any, max_pixels: int) -> Value | None:
    if kind == "image":
        check_image(data, max_pixels)
    elif kind == "text":
        data.decode("utf-8")
    elif kind == "json":
        json.loads(data)
    elif kind == "integer":
        return _plain(int(data.decode("ascii")))
    elif kind == "digits":
        return _plain(int(data))
    elif kind == "file":
        if data["bytes"] is None:
            raise ValueError(f"holds only a path ({data.get('path')!r}), which is not followed")
        return _plain(data["bytes"])
    return _plain(data)


def _plain(value: Any) -> Value | None:
    """Return texts as bytes and truth values as integers; integers must fit 64 bits."""
    if isinstance(value, list):
        values = [_plain(v) for v in value]
        if len({type(v) for v in values}) > 1 or any(
            v is None or isinstance(v, list) for v in values
        ):
            raise ValueError("is a list of unlike values")
        return values or None  # type: ignore[return-value]
    if isinstance(value, str):
        return value.encode("utf-8")  # a lone surrogate, which JSON can hold, is an error
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{value} does not fit a 64-bit integer")
        return int(value)
    if isinstance(value, float) and math.isfinite(value) and abs(value) > MAX_FLOAT:
        raise ValueError(f"{value} does not fit a 32-bit float")
    if value is None or isinstance(value, (bytes, float)):
        return value
    raise ValueError(f"is a {type(value).__name__}, which a record cannot hold")


def check_image(data: bytes, max_pixels: int = pictures.MAX_PIXELS) -> None:
    """Decode the whole picture as the `image` modality does; raises what that raises."""
    pictures.rgb(pictures.open_picture(data, max_pixels))


def plain_words(error: Exception) -> str:
    """Return the message of an error without object addresses, which differ between runs."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image of a known format"
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def raw_file(extension: str, data: bytes) -> Raw:
    """Return the kind of a file's content, by the last part of its extension."""
    last = extension.rpartition(".")[2]
    kinds = (("image", IMAGES), ("text", TEXTS), ("integer", INTEGERS), ("json", {"json"}))
    return next((kind for kind, known in kinds if last in known), "bytes"), data
