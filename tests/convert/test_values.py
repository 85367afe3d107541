"""Values of examples: bad ones, chosen fields and stated types."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conversions import (
    Members,
    jpeg,
    open_,
    png,
    says,
    write_tar,
)
from PIL import Image as Pil

from mmjax.convert.convert import MANIFEST, convert, main
from mmjax.convert.values import type_of

BAD: Mapping[str, tuple[Members, str]] = {
    "image cut off": ([("1.png", png(64)[:-30]), ("1.txt", b"t")], "field 'png': OSError: "),
    "no image": ([("1.jpg", b"jpeg")], "field 'jpg': no image of a known format"),
    "no integer": ([("1.cls", b"cat")], "field 'cls': ValueError: invalid literal"),
    "no UTF-8": ([("1.txt", b"\xff")], "field 'txt': UnicodeDecodeError"),
    "no JSON": ([("1.json", b"{")], "field 'json': JSONDecodeError"),
    "twice": ([("1.txt", b"a"), ("1.TXT", b"b")], "has two members '.txt'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_example_is_counted_named_and_left_out(
    tmp_path: Path, case: str, capsys: Any
) -> None:
    bad, words = BAD[case]
    good = [(f"{i}.txt", b"good") for i in (0, 2)]
    source = write_tar(tmp_path / "a.tar", [good[0], *bad, good[1]])
    says(f"1 bad example, over --max_bad=0; 1 good so far. a.tar, '1': {words}",
         lambda: convert([source], tmp_path / "out"))  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    main([str(source), f"--out={tmp_path / 'out'}", "--max_bad=1"])
    assert [e["__key__"] for e in open_(tmp_path / "out")] == [b"0", b"2"]
    (named,) = json.loads((tmp_path / "out" / MANIFEST).read_text())["bad"]
    assert named.startswith(f"a.tar, '1': {words}") and " at 0x" not in named
    said = capsys.readouterr().out
    assert "skipped: 1 bad example" in said and named in said


def test_more_bad_examples_than_allowed(tmp_path: Path) -> None:
    bad = [(f"{i}.cls", b"x") for i in range(5)]
    source = write_tar(tmp_path / "a.tar", [*bad, ("9.txt", b"t")])
    says("5 bad examples, over --max_bad=4", lambda: convert([source], tmp_path / "o", max_bad=4))
    assert convert([source], tmp_path / "o", max_bad=5).manifest["examples"] == 1


def test_a_stem_that_comes_back_is_not_merged_or_lost_silently(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("b.txt", b"2"), ("a.cls", b"3"), ("c.txt", b"4")]
    source = write_tar(tmp_path / "a.tar", members)
    says("a.tar, 'a': is there twice: members of one stem must lie together",
         lambda: convert([source], tmp_path / "o"))  # fmt: skip
    made = convert([source], tmp_path / "o", max_bad=1)
    assert [e["txt"] for e in open_(made.path)] == [b"1", b"2", b"4"]
    # In another file it is another example.
    write_tar(tmp_path / "b.tar", [("a.txt", b"5")])
    made = convert([source, tmp_path / "b.tar"], tmp_path / "p", max_bad=1)
    assert made.manifest["examples"] == 4


def test_a_folder_without_a_caption_or_with_two_images_of_one_stem(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "b.k.png", "b.jpg", "c.png"):
        content = jpeg(png()) if name.endswith("jpg") else png()
        (tmp_path / name).write_bytes(content)
    for name in ("b.txt", "b.k.txt"):
        (tmp_path / name).write_text("t")
    (tmp_path / "c.txt").write_text(" \n")
    out = tmp_path.parent / f"{tmp_path.name}-out"
    says("'a.png': has no caption: 'a.txt' is missing", lambda: convert([tmp_path], out))
    made = convert([tmp_path], out, max_bad=3)
    assert made.manifest["bad"] == [
        "'a.png': has no caption: 'a.txt' is missing",
        "'b.png': another image has the stem 'b'",
        "'c.png': has an empty caption",
    ]
    assert [e["__key__"] for e in open_(out)] == [b"b", b"b.k"]


def test_an_example_that_is_too_large(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mmjax.convert.tar.MAX_BYTES", 2**20)
    monkeypatch.setattr("mmjax.convert.folder.MAX_BYTES", 100)
    source = write_tar(tmp_path / "a.tar", [("1.bin", bytes(2**20 + 1)), ("2.bin", b"x")])
    says("a.tar, '1': is over 1 MiB", lambda: convert([source], tmp_path / "o"))
    assert len(open_(convert([source], tmp_path / "o", max_bad=1).path)) == 1
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(64))
    (folder / "a.txt").write_text("t")
    says("'a.png': is over", lambda: convert([folder], tmp_path / "p"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # the limit is our own
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_picture_that_would_fill_the_memory(tmp_path: Path, side: int) -> None:
    out = io.BytesIO()
    Pil.new("1", (side, 10_000)).save(out, "PNG")  # some kB of file, 100 million pixels or more
    source = write_tar(tmp_path / "a.tar", [("1.png", out.getvalue())])
    words = "x 10000 pixels is over the bound" if side == 10_000 else "has over 178956970 pixels"
    says(words, lambda: convert([source], tmp_path / "o"))


def test_fields_are_chosen_and_renamed(tmp_path: Path) -> None:
    members = [
        ("1.jpg", jpeg(png())),
        ("1.txt", b"one"),
        ("2.png", png()),
        ("2.txt", b"two"),
        ("2.cls", b"x"),
    ]
    source = write_tar(tmp_path / "a.tar", members)
    main([str(source), f"--out={tmp_path / 'o'}", "--field=image=jpg,png", "--field=txt"])
    one, two = open_(tmp_path / "o")
    assert one == {"__key__": b"1", "image": jpeg(png()), "txt": b"one"}
    assert two == {"__key__": b"2", "image": png(), "txt": b"two"}  # the bad label is not wanted
    for wanted, words in [
        ({"c": ("cls",)}, "'1': has no 'cls'"),
        ({"i": ("jpg", "txt")}, "'1': has more than one of 'jpg' or 'txt'"),
    ]:
        says(words, lambda wanted=wanted: convert([source], tmp_path / "p", fields=wanted))


@pytest.mark.parametrize("word", ["=a", "a=b,", "a=,b", "", "txt", "txt:int", ":int=a"])
def test_fields_that_make_no_sense(tmp_path: Path, word: str) -> None:
    source = write_tar(tmp_path / "a.tar", [("1.txt", b"a")])
    words = [str(source), f"--out={tmp_path / 'o'}", "--field=txt", f"--field={word}"]
    says(f"--field={word}: write NAME", lambda: main(words))


def folder_with(folder: Path, table: str, name: str = "captions.csv") -> Path:
    folder.mkdir()
    for row in table.splitlines()[1:]:
        (folder / row.split("\t" if name.endswith("tsv") else ",")[0]).write_bytes(png())
    (folder / name).write_text(table)
    return folder


COLUMNS = {  # cells of a column, and what a record holds
    "integers": (["3", "-7", "0"], [3, -7, 0]),
    "large": (["9223372036854775807", "-9223372036854775808", "1"], [2**63 - 1, -(2**63), 1]),
    "with gaps": (["3", "", "4"], [3, None, 4]),
    "empty": (["", "", ""], [b"", b"", b""]),
    "one text": (["3", "x", "4"], [b"3", b"x", b"4"]),
    "floats": (["0.50", "1", "2"], [b"0.50", b"1", b"2"]),
    "leading zeros": (["007", "8", "9"], [b"007", b"8", b"9"]),
    "beyond 64 bits": (["9223372036854775808", "1", "2"], [b"9223372036854775808", b"1", b"2"]),
    "plus": (["+1", "2", "3"], [b"+1", b"2", b"3"]),
    "other digits": (["\u0663", "2", "3"], ["\u0663".encode(), b"2", b"3"]),
    "blank": ([" 1", "2", "3"], [b" 1", b"2", b"3"]),
}


@pytest.mark.parametrize("name", ["captions.csv", "captions.tsv"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_is_one_of_integers_where_every_cell_is(
    tmp_path: Path, kind: str, name: str
) -> None:
    """Written as integers are, so that nothing of a text is lost."""
    cells, expected = COLUMNS[kind]
    rows = ["file,label,caption", *(f"{i}.png,{cell},12" for i, cell in enumerate(cells))]
    table = "\n".join(rows) + "\n"
    table = table.replace(",", "\t") if name.endswith("tsv") else table
    made = convert([folder_with(tmp_path / "in", table, name)], tmp_path / "out")
    examples = list(open_(made.path))
    assert [e.get("label") for e in examples] == expected
    assert all(e["caption"] == b"12" for e in examples)  # a caption is a text always
    known = made.manifest["fields"]["label"]
    lacking = expected.count(None)
    assert known == {"type": type_of(expected[0]), "examples": 3 - lacking}


TABLE = "file,caption,label,score,code\n0.png,a,3,0.5,007\n1.png,b,4,2,8\n"


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("label", [3, 4]),
        ("label:text", [b"3", b"4"]),
        ("label:float", [3.0, 4.0]),
        ("score:float", [0.5, 2.0]),
        ("score", [b"0.5", b"2"]),
        ("code:int", [7, 8]),
        ("code:text", [b"007", b"8"]),
        ("x:int=label", [3, 4]),
        ("x:int=missing,code", [7, 8]),
    ],
)
def test_a_type_is_stated_by_hand(tmp_path: Path, field: str, expected: list[Any]) -> None:
    folder = folder_with(tmp_path / "in", TABLE)
    main([str(folder), f"--out={tmp_path / 'out'}", f"--field={field}", "--field=image"])
    name = field.partition("=")[0].partition(":")[0]
    values = [e[name] for e in open_(tmp_path / "out")]
    assert values == expected and {type(v) for v in values} == {type(expected[0])}


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("score:int", "'0.png': field 'score': ValueError: is '0.5', no int"),
        ("caption:float", "field 'caption': ValueError: is 'a', no float"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path: Path, field: str, words: str) -> None:
    folder = folder_with(tmp_path / "in", TABLE)
    says(words, lambda: main([str(folder), f"--out={tmp_path / 'o'}", f"--field={field}"]))


def test_types_of_other_sources_are_stated_too(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", [("1.txt", b"41"), ("1.id", b"7\n"), ("1.s", b"1e3")])
    made = convert(
        [source], tmp_path / "o",
        fields={"txt": ("txt",), "id": ("id",), "s": ("s",)}, types={"id": "int", "s": "float"},
    )  # fmt: skip
    assert list(open_(made.path)) == [{"__key__": b"1", "txt": b"41", "id": 7, "s": 1000.0}]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": ["5", "6"], "m": [[1, 2], [3, 4]], "f": [2.0, 3.5]}), file)
    made = convert(
        [file], tmp_path / "p",
        fields={"n": ("n",), "m": ("m",), "f": ("f",)}, types={"n": "int", "m": "float", "f": "text"},
    )  # fmt: skip
    one, two = open_(made.path)
    assert (one["n"], two["n"], one["f"], two["f"]) == (5, 6, b"2.0", b"3.5")
    assert one["m"].dtype == np.float32 and two["m"].tolist() == [3.0, 4.0]


def test_the_bound_of_pixels_is_stated_by_hand(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", [("1.png", png(20))])
    words = "a picture of 20 x 20 pixels is over the bound of 399 pixels"
    says(words, lambda: main([str(source), f"--out={tmp_path / 'o'}", "--max_pixels=399"]))
    main([str(source), f"--out={tmp_path / 'o'}", "--max_pixels=400"])
    says("--max_pixels: max_pixels is 0", lambda: convert([source], tmp_path / "p", max_pixels=0))
