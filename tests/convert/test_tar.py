"""Tar archives, as WebDataset writes them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from conversions import (
    COUNT,
    assert_same_rows,
    members_of,
    open_,
    png,
    says,
    spec,
    write_tar,
)
from etils import epath

from mmjax.convert import values as found_module
from mmjax.convert.convert import convert
from mmjax.convert.tar import read_tar
from mmjax.core.errors import UserError


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
        assert row.fields["cls"] == whole["group"]


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
    """Return six members of 2,000 bytes; each takes 512 + 2,048."""
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
        else:  # a bit without meaning, such as the time of packing
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
