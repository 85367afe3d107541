"""Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import (
    COUNT,
    assert_same_rows,
    open_,
    says,
    spec,
)

from mmjax.convert.convert import convert


def test_parquet_reads_back_into_the_modalities(drawings: list[Any], tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [{"bytes": d["image"], "path": "nowhere.png"} for d in drawings],
            "plain": [d["image"] for d in drawings],
            "caption": [d["caption"].decode() for d in drawings],
            "vendor": pa.array(["a" if d["vendor"] else "b" for d in drawings]).dictionary_encode(),
            "group": pa.array([d["group"] for d in drawings], pa.uint8()),
            "score": [i / 8 for i in range(COUNT)],
            "box": [[0.0, float(i), 2.0, 3.0] for i in range(COUNT)],
            "flag": [i % 2 == 0 for i in range(COUNT)],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    made = convert([tmp_path / "a.parquet"], tmp_path / "out")
    assert {n: f["type"] for n, f in made.manifest["fields"].items()} == {
        "image": "bytes", "plain": "bytes", "caption": "bytes", "vendor": "bytes", "group": "int64",
        "score": "float32", "box": "float32", "flag": "int64",
    }  # fmt: skip
    rows = spec("image", "caption", ("group", "flag"))
    for i, (example, whole) in enumerate(zip(open_(made.path), drawings, strict=True)):
        row = rows.make(example, None)
        assert_same_rows(row, rows.make({**whole, "flag": 0}, None))
        assert (row.fields["group"], row.fields["flag"]) == (whole["group"], i % 2 == 0)
        assert example["plain"] == whole["image"] and example["score"] == i / 8
        assert example["vendor"] == (b"a" if whole["vendor"] else b"b")
        np.testing.assert_array_equal(example["box"], np.float32([0, i, 2, 3]))


def test_nulls_are_fields_that_an_example_lacks(tmp_path: Path) -> None:
    table = pa.table({"a": [1, None, 3], "b": ["x", "y", None], "none": pa.nulls(3)})
    pq.write_table(table, tmp_path / "a.parquet")
    made = convert([tmp_path / "a.parquet"], tmp_path / "out")
    assert list(open_(made.path)) == [{"a": 1, "b": b"x"}, {"b": b"y"}, {"a": 3}]
    assert {n: f["examples"] for n, f in made.manifest["fields"].items()} == {"a": 2, "b": 2}
    # With --field they are wanted in every example.
    says("row 1: has no 'a'",
         lambda: convert([tmp_path / "a.parquet"], tmp_path / "o", fields={"a": ("a",)}))  # fmt: skip


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (
            pa.array([{"bytes": None, "path": "/etc/passwd"}] * 2),
            "holds only a path ('/etc/passwd')",
        ),
        (pa.array([2**63, 1], pa.uint64()), "9223372036854775808 does not fit a 64-bit integer"),
        (pa.array([1e300, 1.0]), "1e+300 does not fit a 32-bit float"),
        (pa.array([[1, None], [1]]), "list of unlike values"),
        (pa.array([b"\xff", b"a"]).cast(pa.string(), safe=False), "UnicodeDecodeError"),
    ],
    ids=["path", "wide integer", "wide float", "null in a list", "no UTF-8"],
)
def test_a_value_that_a_record_cannot_hold(tmp_path: Path, column: Any, words: str) -> None:
    pq.write_table(pa.table({"x": column, "y": [1, 2]}), tmp_path / "a.parquet")
    source = [tmp_path / "a.parquet"]
    says("a.parquet, row 0: field 'x': ", lambda: convert(source, tmp_path / "out"))
    says(words, lambda: convert(source, tmp_path / "out"))
    assert len(open_(convert(source, tmp_path / "out", fields={"y": ("y",)}).path)) == 2


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([0], pa.timestamp("ms")), "timestamp[ms]"),
        (pa.array([{"a": 1}]), "struct<a: int64>"),
        (pa.array([[[1]]]), "list<element: list<"),
        (pa.array([{"bytes": 1}]), "struct<bytes: int64>"),
    ],
)
def test_a_column_that_no_record_can_hold(tmp_path: Path, column: Any, kind: str) -> None:
    pq.write_table(pa.table({"x": column, "y": [1]}), tmp_path / "a.parquet")
    source = [tmp_path / "a.parquet"]
    says(f"column 'x' has type {kind}", lambda: convert(source, tmp_path / "o"))
    convert(source, tmp_path / "o", fields={"y": ("y",)})


def test_an_image_in_a_column_of_images_must_decode(drawings: list[Any], tmp_path: Path) -> None:
    images = [d["image"] for d in drawings]
    images[3] = b"no image"
    pq.write_table(pa.table({"x": images, "n": list(range(COUNT))}), tmp_path / "a.parquet")
    says("a.parquet, row 3: field 'x': no image of a known format",
         lambda: convert([tmp_path / "a.parquet"], tmp_path / "o"))  # fmt: skip
    made = convert([tmp_path / "a.parquet"], tmp_path / "o", max_bad=1)
    assert [e["n"] for e in open_(made.path)] == [i for i in range(COUNT) if i != 3]
    held = pa.table({"x": [{"bytes": image, "path": None} for image in images]})
    pq.write_table(held, tmp_path / "c.parquet")
    says("c.parquet, row 3: field 'x': no image of a known format",
         lambda: convert([tmp_path / "c.parquet"], tmp_path / "c"))  # fmt: skip
    # Bytes that are no images are left alone.
    pq.write_table(pa.table({"x": [b"GIF8", *[b"sound"] * 9]}), tmp_path / "b.parquet")
    assert len(open_(convert([tmp_path / "b.parquet"], tmp_path / "b").path)) == 10


@pytest.mark.parametrize("harm", ["cut", "flipped", "garbage"])
def test_a_parquet_file_that_is_damaged(drawings: list[Any], tmp_path: Path, harm: str) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"x": [d["caption"].decode() for d in drawings]})
    pq.write_table(table, path, write_page_checksum=True)
    raw = bytearray(path.read_bytes())
    if harm == "flipped":
        raw[60] ^= 1
    path.write_bytes({"cut": raw[:-5], "flipped": raw, "garbage": b"PAR1" * 20}[harm])
    says(f"{path} cannot be read after row 0", lambda: convert([path], tmp_path / "out"))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    says("two columns of one name: x, x", lambda: convert([tmp_path / "a.parquet"], tmp_path / "o"))


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    says("no column 'txt'; it has: text",
         lambda: convert([tmp_path / "a.parquet"], tmp_path / "o", fields={"t": ("txt",)}))  # fmt: skip
