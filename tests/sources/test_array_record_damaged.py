"""Bytes flipped in real ArrayRecord files: those examples become invalid slots, counted and named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from mains import Ended, apart

from mmjax.convert.convert import convert
from mmjax.core.errors import UserError
from mmjax.data.identity import is_same
from mmjax.data.order import example_ids
from mmjax.engine import checkpoint
from mmjax.engine.loader import Loader, LoaderConfig, make_batch
from mmjax.engine.state import Clock
from mmjax.loading import find_step
from mmjax.modalities.image import Image
from mmjax.schedule.phase_specs import from_config
from mmjax.schedule.phases import make_phases
from mmjax.sources.array_record import ArrayRecord
from mmjax.sources.base import Examples
from mmjax.sources.tfds import Tfds
from mmjax.task import RowSpec, Task, make_task

COUNT, SHARDS, BATCH = 40, 2, 8
DAMAGED = (0, 7, 20, 23)  # records 0 and 7 of the first file, 0 and 3 of the second
NAME = "drawings-{:05d}-of-00002.array_record"
PLACE = {i: (NAME.format(i // 20), i % 20) for i in DAMAGED}


def flip(file: Path, content: bytes) -> None:
    """Change one byte of `content` where it stands in the file."""
    raw = bytearray(file.read_bytes())
    # Packed pixels stay as they are when a record is compressed; somewhere a run of them must show.
    found = (raw.find(content[i : i + 16]) for i in range(len(content) // 2, len(content) - 16))
    raw[next(place for place in found if place >= 0) + 8] ^= 0x10
    file.write_bytes(raw)


@dataclass(frozen=True)
class Data:
    """A converted data set, whole and with damaged records."""

    whole: Path
    damaged: Path


@pytest.fixture(scope="module")
def data(emoji_dir: epath.Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("corrupt")
    images = folder / "images"
    images.mkdir()
    drawings = ArrayRecord(str(emoji_dir / "emoji" / "1.0.0"), "emoji-test_drawing*").open()
    lines = []
    for i in range(COUNT):
        (images / f"{i:02d}.png").write_bytes(drawings[i]["image"])
        lines.append(f'{{"file": "{i:02d}.png", "caption": "drawing {i}", "label": {i % 3}}}\n')
    (images / "captions.jsonl").write_text("".join(lines))
    convert([images], folder / "whole" / "drawings", shards=SHARDS)
    shutil.copytree(folder / "whole", folder / "damaged")
    whole = open_(folder / "whole" / "drawings")
    for index in DAMAGED:
        flip(folder / "damaged" / "drawings" / PLACE[index][0], whole[index]["image"])
    return Data(folder / "whole" / "drawings", folder / "damaged" / "drawings")


def open_(path: Path) -> Examples:
    return ArrayRecord(str(path)).open()


def make(path: Path) -> Task:
    block = {
        "source": {"name": "array_record", "path": str(path)},
        "inputs": {"image": {"size": 16}},
        "objective": {"name": "classification", "classes": 3},
        "batch": BATCH,
    }
    return make_task("labels", block, {"image": Image()})


# --- the source --------------------------------------------------------------------------------


def test_damaged_records_raise_with_file_and_place_and_the_others_read(data: Data) -> None:
    whole, damaged = open_(data.whole), open_(data.damaged)
    assert (len(damaged), damaged.fields) == (len(whole), whole.fields)
    assert is_same(damaged.identity, whole.identity), "a run that meets damage can continue"
    # Back and forth, twice: an error must not change what is read after it.
    for index in (*range(COUNT), *reversed(range(COUNT))):
        if index in DAMAGED:
            file, record = PLACE[index]
            with pytest.raises(
                ValueError, match=rf"^{re.escape(file)}, record {record}: .*mismatch"
            ):
                damaged[index]
        else:
            assert damaged[index] == whole[index]


@pytest.mark.parametrize("index", [-1, COUNT])
def test_no_record_outside(data: Data, index: int) -> None:
    with pytest.raises(IndexError, match=f"has {COUNT} records; no record {index}"):
        open_(data.whole)[index]


def test_threads_that_meet_damage_at_once(data: Data) -> None:
    whole, damaged = open_(data.whole), open_(data.damaged)

    def read(index: int) -> Any:
        try:
            return damaged[index]
        except ValueError:
            return None

    indices = [i % COUNT for i in range(800)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, indices))
    for index, example in zip(indices, found, strict=True):
        assert example == (None if index in DAMAGED else whole[index])


@pytest.mark.parametrize(
    "how", ["cut by a byte", "cut in half", "emptied", "footer", "another format"]
)
def test_a_file_that_cannot_be_opened_is_not_left_out(data: Data, tmp_path: Path, how: str) -> None:
    shutil.copytree(data.whole, tmp_path / "d")
    file = tmp_path / "d" / NAME.format(0)
    raw = bytearray(file.read_bytes())
    if how == "footer":
        raw[-65536 + 10] ^= 1
    kept = {"cut by a byte": len(raw) - 1, "cut in half": len(raw) // 2, "emptied": 0}
    file.write_bytes(b"PK\3\4" * 999 if how == "another format" else raw[: kept.get(how)])
    with pytest.raises(UserError, match=rf"1 of 2 .*{re.escape(str(file))}.*Copy or convert again"):
        open_(tmp_path / "d")


def test_a_missing_file_is_noticed(data: Data, tmp_path: Path) -> None:
    shutil.copytree(data.whole, tmp_path / "d")
    (tmp_path / "d" / NAME.format(1)).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of the 2 files.*{NAME.format(1)}"):
        open_(tmp_path / "d")
    assert len(ArrayRecord(str(tmp_path / "d"), "*-00000-of*").open()) == COUNT // 2


def test_fields_are_known_although_the_first_record_is_damaged(data: Data, tmp_path: Path) -> None:
    shutil.copytree(data.damaged, tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    assert 0 in DAMAGED and open_(tmp_path / "d").fields == open_(data.whole).fields


def test_no_record_that_can_be_read(data: Data, tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for _ in range(3):
        writer.write(b"\xff no message")
    writer.close()
    with pytest.raises(
        UserError, match=r"None of the first 3 records .*x.array_record, record 2: "
    ):
        open_(tmp_path)


# --- batches -----------------------------------------------------------------------------------


def rows(batch: Any) -> np.ndarray:
    return batch.inputs["image"]["pixels"]


def test_a_batch_with_invalid_slots(data: Data) -> None:
    spec = make(data.whole).rows()
    ids = [22, 23, 7, 24]
    expected, nothing = make_batch(spec, open_(data.whole), ids, lambda _: None, 5)
    found, failed = make_batch(spec, open_(data.damaged), ids, lambda _: None, 5)
    assert nothing == ()
    np.testing.assert_array_equal(found.valid, [True, False, False, True, False])
    np.testing.assert_array_equal(rows(found)[[0, 3]], rows(expected)[[0, 3]])
    assert not rows(found)[[1, 2, 4]].any() and rows(expected)[:4].any(axis=(1, 2, 3)).all()
    assert [row for row, _ in failed] == [1, 2]
    for (_, words), index in zip(failed, (23, 7), strict=True):
        file, record = PLACE[index]
        assert words.startswith(
            f"{data.damaged}/*.array_record*[{index}]: ValueError: {file}, record {record}: "
        )


def test_other_damage_makes_invalid_slots_too() -> None:
    """A message without the field, a text for a label, an image that does not decode."""
    png = b"\x89PNG\r\n\x1a\n" + b"\0" * 40

    class Bad(Examples):
        description, identity, fields = "bad", "bad", ("image", "label")
        held: Sequence[dict[str, Any]] = (
            {"label": 1},
            {"image": png, "label": 1},
            {"image": np.zeros((4, 4, 3), np.uint8), "label": "cat"},
            {"image": np.zeros((4, 4, 3), np.uint8), "label": 1},
        )

        def __len__(self) -> int:
            return len(self.held)

        def __getitem__(self, index: int) -> Any:
            return self.held[index]

    spec = RowSpec(make(Path("x")).inputs, ("label",))
    found, failed = make_batch(spec, Bad(), range(4), lambda _: None, 4)
    np.testing.assert_array_equal(found.valid, [False, False, False, True])
    assert [words.split(":")[0] for _, words in failed] == ["bad[0]", "bad[1]", "bad[2]"]


def epoch(path: Path, threads: int = 2) -> Iterator[Any]:
    schedule = from_config("shares", {"labels": 1}, 0, ())
    clock = Clock(0, schedule, {}, {}, {})
    steps = COUNT // BATCH
    phases, data = make_phases({"labels": make(path)}, (), (), {}), {"labels": open_(path)}
    config = LoaderConfig(threads=threads)
    loader = Loader(config, phases, data, clock, steps, 3, lambda size: (0, size))
    yield from loader
    loader.close()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_loader_goes_on_and_every_other_row_is_the_same(data: Data, threads: int) -> None:
    ids = example_ids(3, "labels", 0, COUNT, COUNT)
    failed: dict[int, str] = {}
    for whole, damaged in zip(epoch(data.whole), epoch(data.damaged, threads), strict=True):
        bad = np.isin(ids[whole.step * BATCH :][:BATCH], DAMAGED)
        np.testing.assert_array_equal(damaged.rows.valid, ~bad)
        np.testing.assert_array_equal(rows(damaged.rows)[~bad], rows(whole.rows)[~bad])
        np.testing.assert_array_equal(damaged.rows.fields["label"][bad], 0)
        failed |= dict(damaged.failed)
        assert whole.failed == ()
    assert sorted(ids[list(failed)]) == list(DAMAGED)
    for position, words in failed.items():
        file, record = PLACE[int(ids[position])]
        assert f"[{ids[position]}]: ValueError: {file}, record {record}: " in words


def test_a_tfds_data_set_with_flipped_bytes(emoji_dir: epath.Path, tmp_path: Path) -> None:
    shutil.copytree(emoji_dir / "emoji", tmp_path / "emoji")
    source = Tfds("emoji", "test_drawing", str(tmp_path))
    encoded = ArrayRecord(str(tmp_path / "emoji" / "1.0.0"), "emoji-test_drawing*").open()
    files = sorted((tmp_path / "emoji" / "1.0.0").glob("emoji-test_drawing*"))
    flip(files[0], encoded[5]["image"])
    spec = RowSpec(make(Path("x")).inputs, ("group",))
    found, failed = make_batch(spec, source.open(), range(4, 8), lambda _: None, 4)
    np.testing.assert_array_equal(found.valid, [True, False, True, True])
    ((row, words),) = failed
    assert row == 1 and "test_drawing[5]: " in words and "mismatch" in words


# --- a whole run -------------------------------------------------------------------------------

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    source = {{"name": "array_record", "path": {path!r}}}
    layer = {{"name": "transformer", "num_heads": 2, "mlp_dim": 16}}
    config = ConfigDict(sort_keys=False)
    config.steps = {steps}
    config.seed = 3
    config.modalities = {{"image": {{"name": "image", "patch": 8}}}}
    config.model = {{"width": 8, "layers": [{{"repeat": 1, "blocks": [layer]}}]}}
    config.tasks = {{"labels": {{
        "source": source,
        "inputs": {{"image": {{"size": 16}}}},
        "objective": {{"name": "classification", "classes": 3}},
        "batch": {batch},
        "evaluators": {{"again": {{"name": "accuracy", "source": source}}}},
    }}}}
    config.evaluation = {{"batch": 16}}
    return config
"""


def arguments(path: Path, folder: Path, *more: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.py"
    config.write_text(CONFIG.format(path=str(path), steps=COUNT // BATCH, batch=BATCH))
    return [f"--config={config}", f"--workdir={folder / 'run'}", *more]


def clock_of(workdir: Path) -> Clock:
    step, meta = find_step(epath.Path(workdir), None)
    assert checkpoint.read_shapes(epath.Path(workdir), step)
    return Clock.from_json(meta["clock"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the runs of `ended` lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ended(data: Data, folder: Path, environment_of: Any) -> dict[str, Ended]:
    """Return how mains ended, all in one process on one device: a run in two parts, and two that are refused."""
    words = arguments(data.damaged, folder / "two")
    shutil.copytree(data.whole, folder / "d")
    file = folder / "d" / NAME.format(1)
    file.write_bytes(file.read_bytes()[:-1])
    limit = "--config.limits.max_invalid_examples=3"
    return apart(
        environment_of(1),
        {
            "first": ["train", *words, "--config.steps=2"],
            "second": ["train", *words],
            "show": ["show", str(folder / "two" / "run")],
            "limit": ["train", *arguments(data.damaged, folder / "limit", limit)],
            "cut": ["train", *arguments(folder / "d", folder / "cut")],
        },
    )


def test_a_run_counts_and_names_them_across_a_restart(
    ended: dict[str, Ended], folder: Path
) -> None:
    """One epoch meets each damaged record once, whatever the restart in the middle."""
    first, second = ended["first"], ended["second"]
    assert (first.status, second.status) == (0, 0), first.err + second.err
    said = re.sub(r"\s+", " ", first.out + first.err + second.out + second.err)
    ids = list(example_ids(3, "labels", 0, COUNT, COUNT))
    for index in DAMAGED:
        file, record = PLACE[index]
        place = f"task labels, position {ids.index(index)}: "
        assert said.count(f"invalid example: {place}") == 1
        assert f"[{index}]: ValueError: {file}, record {record}: " in said
    run = folder / "two" / "run"
    assert clock_of(run).invalid == {"labels": 4}
    shown = ended["show"].out
    assert re.search(r"labels\s+5\s+40\s+0\s+4\b", shown), shown
    assert "23]" in (run / "goodput.jsonl").read_text()
    # The held-out pass leaves them out as well.
    assert re.search(r"top-1 accuracy .*\s36\b", second.out), second.out


def test_a_run_past_its_limit_stops_and_says_which(ended: dict[str, Ended]) -> None:
    done = ended["limit"]
    assert done.status == 2
    ids = list(example_ids(3, "labels", 0, COUNT, COUNT))
    last = max(DAMAGED, key=ids.index)
    said = re.sub(r"\s+", " ", done.err)
    assert (
        "Task 'labels': 4 examples could not be read, over limits.max_invalid_examples = 3" in said
    )
    assert f"[{last}]: ValueError: {PLACE[last][0]}, record {PLACE[last][1]}: " in said
    assert "Traceback" not in done.err


def test_a_run_on_a_file_cut_off_does_not_start(ended: dict[str, Ended]) -> None:
    done = ended["cut"]
    assert done.status == 2 and NAME.format(1) in done.err and "Traceback" not in done.err
