"""Identities: other content or another order is another identity, and older checkpoints know theirs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import toyrun
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2
from tensorflow_datasets.proto import tf_feature_pb2 as pb

from mmjax import evaluate
from mmjax.core.errors import UserError
from mmjax.data.identity import facts_of, identity, is_same, places, records_of, sample
from mmjax.sources.array_record import ArrayRecord
from mmjax.sources.base import Examples
from mmjax.sources.joined import JoinedExamples
from mmjax.sources.moving_emoji import MovingEmoji
from mmjax.sources.tfds import Tfds

NAME = "train-{:05d}-of-00004.array_record"
COUNT = 200
Change = Callable[[list[bytes]], list[bytes]]


def message(number: int, caption: int) -> bytes:
    features = {
        "number": pb.Feature(int64_list=pb.Int64List(value=[number % 100])),
        "caption": pb.Feature(bytes_list=pb.BytesList(value=[f"caption {caption:03d}".encode()])),
    }
    return tf_example_pb2.Example(features=pb.Features(feature=features)).SerializeToString()


def write(file: Path, records: Sequence[bytes]) -> None:
    writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


def write_all(folder: Path, records: Sequence[bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(4):
        write(folder / NAME.format(i), records[i * COUNT // 4 : (i + 1) * COUNT // 4])


@pytest.fixture(scope="module")
def records() -> list[bytes]:
    return [message(i, i) for i in range(COUNT)]


@pytest.fixture
def folder(tmp_path: Path, records: list[bytes]) -> Path:
    write_all(tmp_path / "data", records)
    return tmp_path / "data"


def opened(folder: Path, **more: Any) -> Examples:
    return ArrayRecord(str(folder), **more).open()


def captions_moved(_: list[bytes]) -> list[bytes]:
    return [message(i, (i + 1) % COUNT) for i in range(COUNT)]


CHANGES: dict[str, Change] = {
    "permuted captions": captions_moved,
    "reordered": lambda r: [r[i] for i in np.random.default_rng(0).permutation(COUNT)],
    "moved by one": lambda r: [*r[1:], r[0]],
    "reversed": lambda r: r[::-1],
    "the first changed": lambda r: [message(0, 7), *r[1:]],
    "the last changed": lambda r: [*r[:-1], message(COUNT - 1, 7)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_or_order_of_the_same_size_is_noticed(
    folder: Path, records: list[bytes], tmp_path: Path, change: str
) -> None:
    write_all(tmp_path / "other", CHANGES[change](records))
    sizes = [[f.stat().st_size for f in sorted(d.iterdir())] for d in (folder, tmp_path / "other")]
    assert sizes[0] == sizes[1], "what was looked at before shows nothing"
    one, other = opened(folder), opened(tmp_path / "other")
    assert not is_same(one.identity, other.identity)
    shutil.copytree(folder, tmp_path / "copy")
    assert is_same(one.identity, opened(tmp_path / "copy").identity)


def test_joined_data_are_those_of_both_sides(
    folder: Path, records: list[bytes], tmp_path: Path
) -> None:
    write_all(tmp_path / "other", CHANGES["permuted captions"](records))

    def joined(one: Path, two: Path) -> str:
        right = opened(two)
        with mock.patch.object(right, "fields", ("number", "words")):
            return JoinedExamples(opened(one), right, "number", ("words",)).identity

    same = joined(folder, folder)
    assert is_same(same, joined(folder, folder))
    assert not is_same(same, joined(tmp_path / "other", folder))
    assert not is_same(same, joined(folder, tmp_path / "other"))


def rewrite(folder: Path, change: Change) -> None:
    """Change the records of the one training file of the emoji drawings, in place."""
    [file] = folder.glob("emoji-train*")
    with ArrayRecordDataSource([str(file)]) as source:
        records = [source[i] for i in range(len(source))]
    write(file, change(records))


def test_data_sets_of_tfds_are_known_by_their_records(
    emoji_dir: epath.Path, tmp_path: Path
) -> None:
    """Our own has a digest of its records in its manifest, which stays although the file changes."""
    folder = tmp_path / "emoji" / "1.0.0"
    shutil.copytree(emoji_dir / "emoji" / "1.0.0", folder)

    def identities() -> list[str]:
        sources = (
            Tfds("emoji", "train", str(tmp_path)),
            MovingEmoji("train", folder=str(tmp_path)),
        )
        with mock.patch("mmjax.datasets.build._fault", return_value=None):  # the file's size
            return [s.open().identity for s in sources]

    before = identities()
    rewrite(folder, lambda r: r)
    assert all(map(is_same, before, identities()))
    rewrite(folder, lambda r: [*r[1:], r[0]])
    assert not any(map(is_same, before, identities()))
    assert [facts_of(x) for x in before] == [facts_of(x) for x in identities()]


def test_a_damaged_record_is_no_other_data(folder: Path, tmp_path: Path) -> None:
    """It becomes an invalid slot; the run continues."""
    whole = opened(folder).identity
    file = folder / NAME.format(0)
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"caption 000") + 3] ^= 0x10
    file.write_bytes(raw)
    damaged = opened(folder).identity
    assert "?" in records_of(damaged) and "?" not in records_of(whole)
    assert is_same(whole, damaged) and is_same(damaged, whole)


# --- which records -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 63, 64])
def test_few_records_are_all_sampled(count: int) -> None:
    assert places(count) == list(range(count))


@pytest.mark.parametrize("count", [65, 1000, 10**12])
def test_of_many_records_the_ends_and_some_between_are_sampled(count: int) -> None:
    chosen = places(count)
    assert chosen[0] == 0 and chosen[-1] == count - 1 and chosen == sorted(set(chosen))
    assert 30 < len(chosen) <= 64
    thirds = np.histogram(chosen, bins=3, range=(0, count))[0]
    assert thirds.min() > 8


def test_the_sampled_records_never_change() -> None:
    """Checkpoints depend on it."""
    assert places(1000)[:6] == PLACES
    assert sample(2, lambda i: b"ab"[i : i + 1]) == [
        hashlib.sha256(x).hexdigest()[:8] for x in (b"a", b"b")
    ]


PLACES = [0, 27, 45, 97, 124, 125]


# --- older checkpoints -------------------------------------------------------------------------


def test_an_older_checkpoint_knows_the_data_by_what_it_looked_at(folder: Path) -> None:
    """Names, sizes and counts of the files, by the statement of version 1."""
    files = sorted(folder.iterdir())
    listed = [[f.name, f.stat().st_size, COUNT // 4] for f in files]
    old = hashlib.sha256(json.dumps([listed, None]).encode()).hexdigest()
    assert is_same(old, opened(folder).identity)
    assert not is_same(old.replace(old[0], "x"), opened(folder).identity)
    # A user's source has a digest without records.
    assert is_same("mine", "mine") and not is_same("mine", "yours")
    assert is_same("mine", identity("mine", ["a"])) and not is_same(
        "mine", identity("yours", ["a"])
    )


# --- missing files -----------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_a_missing_shard_is_refused(folder: Path, index: int) -> None:
    (folder / NAME.format(index)).unlink()
    with pytest.raises(
        UserError, match=rf"lacks 1 of the 4 files .*{NAME.format(index)}.*partial = true"
    ):
        opened(folder)
    assert len(opened(folder, partial=True)) == COUNT * 3 // 4


def test_a_part_that_is_asked_for_lacks_nothing(folder: Path) -> None:
    """Also beside another set of files, and files that are not numbered."""
    write(folder / "test-00000-of-00001.array_record", [message(1, 1)])
    write(folder / "more.array_record", [message(1, 1)])
    assert len(opened(folder)) == COUNT + 2
    assert len(opened(folder, glob="train-0000[13]-of*")) == COUNT // 2
    (folder / NAME.format(3)).unlink()
    assert len(opened(folder, glob="test*")) == 1
    with pytest.raises(UserError, match=rf"lacks 1 of the 2 files .*{NAME.format(3)}"):
        opened(folder, glob="train-0000[13]-of*")


# --- held-out data -----------------------------------------------------------------------------


def test_other_held_out_data_are_announced_and_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).normal(size=(16, 4, 6)).astype(np.float32)
    np.save(tmp_path / "held.npy", values)
    held = {"name": "toy", "count": 16, "file": str(tmp_path / "held.npy")}
    overrides = [f"tasks.{t}.evaluators.loss.source={held!r}" for t in ("one", "two")]
    toyrun.run(tmp_path / "run", *overrides, "steps=4")
    words = "has changed since the run's checkpoint was written"
    toyrun.run(tmp_path / "run", *overrides, "steps=6")
    evaluate.evaluate(epath.Path(tmp_path / "run"), None, [])
    assert words not in capsys.readouterr().out
    np.save(tmp_path / "held.npy", values[::-1])
    evaluate.evaluate(epath.Path(tmp_path / "run"), None, [])
    assert capsys.readouterr().out.count(words) == 1
    assert toyrun.run(tmp_path / "run", *overrides, "steps=8") is not None
    printed = capsys.readouterr().out
    assert printed.count(words) == 1 and "held.npy" in printed
    toyrun.run(
        tmp_path / "run", *overrides, "steps=10"
    )  # the new data are those of the checkpoint now
    assert words not in capsys.readouterr().out
