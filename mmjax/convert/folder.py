"""A folder of images, with captions in text files beside them or in one table."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from etils import epath

from mmjax.convert.values import IMAGES, KEY, MAX_BYTES, Found, Ignored
from mmjax.core.errors import UserError

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")

TABLES = ("captions.csv", "captions.tsv", "captions.jsonl")


def read_folder(folder: epath.Path, ignored: Ignored) -> Iterator[Found]:
    """Yield images with their captions, from one table or from text files beside them."""
    inside = dict(sorted(_walk(folder, "", ignored)))
    images = {name: f for name, f in inside.items() if _extension(name) in IMAGES}
    tables = [name for name in TABLES if name in inside]
    others = inside.keys() - images.keys() - set(tables)
    captions = {name for name in others if _extension(name) == "txt" and not tables}
    if len(tables) > 1:
        raise UserError(f"{folder} has several tables of captions ({', '.join(tables)}): keep one.")
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGES))}).")
    stems = {_stem(name) for name in images}
    for name in sorted(n for n in others if n not in captions or _stem(n) not in stems):
        ignored.add(name)
    if tables:
        yield from _by_table(inside[tables[0]], images)
    else:
        yield from _by_sidecar(images, {name: inside[name] for name in captions})


def _walk(folder: epath.Path, prefix: str, ignored: Ignored) -> Iterator[tuple[str, epath.Path]]:
    """Yield (relative name, file) of all but hidden files; links to folders are not followed."""
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            yield name, entry
        elif os.path.islink(entry):
            ignored.add(name)
        else:
            yield from _walk(entry, f"{name}/", ignored)


def _extension(name: str) -> str:
    return PurePosixPath(name).suffix[1:].lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _image(name: str, file: epath.Path) -> Found:
    result = Found(repr(name), {KEY: ("value", _stem(name)), "image": ("image", b"")})
    if file.stat().length > MAX_BYTES:
        result.fault = f"is over {MAX_BYTES >> 20} MiB"
    else:
        result.raw["image"] = ("image", file.read_bytes())
    return result


def _by_sidecar(
    images: Mapping[str, epath.Path], captions: Mapping[str, epath.Path]
) -> Iterator[Found]:
    beside = {_stem(name): file for name, file in captions.items()}
    seen: set[str] = set()
    for name, file in images.items():
        image, stem = _image(name, file), _stem(name)
        if stem in seen:
            image.fault = f"another image has the stem {stem!r}"
        elif stem not in beside:
            image.fault = image.fault or f"has no caption: {stem + '.txt'!r} is missing"
        else:
            _caption(image, beside[stem].read_bytes())
        seen.add(stem)
        yield image


def _caption(image: Found, text: bytes) -> None:
    """Add a caption; blanks around it do not count."""
    image.raw["caption"] = ("text", text.strip())
    if not text.strip():
        image.fault = image.fault or "has an empty caption"


def _by_table(table: epath.Path, images: Mapping[str, epath.Path]) -> Iterator[Found]:
    used: set[str] = set()
    for where, row, fault in _rows(table):
        name, caption = row.get("file"), row.get("caption")
        if not fault and not (isinstance(name, str) and isinstance(caption, str)):
            fault = "needs a 'file' and a 'caption', both texts"
        elif not fault and name not in images:
            fault = f"there is no image {name!r} in the folder"
        elif not fault and name in used:
            fault = f"{name!r} is listed before"
        if fault:
            yield Found(where, fault=fault)
            continue
        used.add(name)  # type: ignore[arg-type]
        image = _image(name, images[name])  # type: ignore[arg-type, index]
        others = row.keys() - {"file", "caption"}
        image.raw |= {n: _cell(row[n]) for n in others if row[n] is not None}
        _caption(image, caption.encode("utf-8", "surrogatepass"))  # type: ignore[union-attr]
        yield image
    for name in sorted(images.keys() - used):
        yield Found(repr(name), fault=f"has no caption: it is not in {table.name}")


def _rows(table: epath.Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (where, columns, fault) of each row."""
    try:
        with table.open("rb") as opened:
            lines = io.TextIOWrapper(opened, "utf-8-sig", newline="")
            for number, row, fault in (
                _json(lines) if table.suffix == ".jsonl" else _csv(table, lines)
            ):
                if taken := row.keys() & {KEY, "image"}:
                    raise UserError(
                        f"{table}: the name {min(taken)!r} is taken; rename this column."
                    )
                yield f"{table.name}, line {number}", row, fault
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table} cannot be read: {error}.") from error


def _json(lines: IO[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            yield number, {}, f"is no JSON: {error}"
            continue
        if isinstance(row, dict):
            yield number, row, ""
        elif line.strip():
            yield number, {}, "is no JSON object"


@dataclass(frozen=True)
class _Digits:
    """A cell of a column that holds nothing but integers."""

    text: str


def _cell(value: Any) -> tuple[str, Any]:
    return ("digits", value.text) if isinstance(value, _Digits) else ("value", value)


def _csv(table: epath.Path, lines: IO[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield rows of a table of texts, the cells of columns of integers as `_Digits`; an empty one of those is None."""
    with table.open("rb") as opened:
        again = io.TextIOWrapper(opened, "utf-8-sig", newline="")
        whole = _integer_columns(row for _, row, fault in _cells(table, again) if not fault)
    for number, row, fault in _cells(table, lines):
        if not fault:
            row |= {n: _Digits(row[n]) if row[n] else None for n in whole}
        yield number, row, fault


def _integer_columns(rows: Iterable[Mapping[str, str]]) -> set[str]:
    """Return the columns with an integer in every cell that is not empty, written as Python would write it.

    Those with leading zeros are texts, and so are those that 64 bits do not hold.
    """
    integers: dict[str, bool] = {}
    for row in rows:
        for name, cell in row.items():
            if cell and name not in ("file", "caption"):
                fits = bool(_INTEGER.fullmatch(cell)) and -(2**63) <= int(cell) < 2**63
                integers[name] = fits and integers.get(name, True)
    return {name for name, fits in integers.items() if fits}


def _cells(table: epath.Path, lines: IO[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    # Tabs separate plain texts, in which a quotation mark is one; commas need quotation.
    rows = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if table.suffix == ".tsv"
        else csv.reader(lines, strict=True)
    )
    head = next(rows, [])
    if not {"file", "caption"} <= set(head) or len(set(head)) < len(head):
        raise UserError(
            f"{table}: its first line must name the columns, each once, 'file' and 'caption' among them; "
            f"it reads {', '.join(map(repr, head)) or 'nothing'}."
        )
    for cells in rows:
        fault = f"has {len(cells)} columns, not {len(head)}" if len(cells) != len(head) else ""
        if cells:
            yield rows.line_num, dict(zip(head, cells, strict=False)), fault
