"""Conversion as a whole: what it writes, and its command."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bucket import bucket as new_bucket
from conversions import (
    files,
    members_of,
    open_,
    says,
    write_tar,
)
from etils import epath

from mmjax.convert import readers
from mmjax.convert.convert import MANIFEST, Converted, convert
from mmjax.sources.array_record import ArrayRecord


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [(f"{i}.txt", b"%d" % i) for i in range(10)])


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
