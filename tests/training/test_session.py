"""Resuming a run: from torn checkpoints, and after its end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toyrun
from etils import epath
from harness import contents, deterministic, finished_steps
from resumed import BATCH, ids, same
from toyrun import block, run, watched

from mmjax import train
from mmjax.core.errors import UserError
from mmjax.dry_run import dry_run
from mmjax.engine import arrays, checkpoint, metadata
from mmjax.engine.integrity import Unreadable
from mmjax.schedule.schedule import Schedule

# --- torn and missing checkpoints --------------------------------------------------------------


def _largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    assert len(content) > 20
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


TEARS: dict[str, Callable[[Path], None]] = {
    "data cut short": lambda step: _truncate(_largest(step / "state" / "d")),
    "data gone": lambda step: _largest(step / "state" / "d").unlink(),
    "list of the arrays gone": lambda step: (step / "state" / "checksums.json").unlink(),
    "a byte of the data changed": lambda step: _flip(_largest(step / "state" / "d")),
    "clock changed": lambda step: _flip(step / "meta" / "metadata"),
    "manifest gone": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "clock cut short": lambda step: _truncate(step / "meta" / "metadata"),
    "clock gone": lambda step: (step / "meta" / "metadata").unlink(),
    "clock of another shape": lambda step: (step / "meta" / "metadata").write_text("[1]"),
    "all but the folder gone": lambda step: [p.unlink() for p in step.rglob("*") if p.is_file()][0],
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    copy: Path, straight: Path, tear: str, capsys: pytest.CaptureFixture[str]
) -> None:
    TEARS[tear](copy / "checkpoints" / "12")
    torn = contents(copy / "checkpoints" / "12")
    run(copy)
    said = capsys.readouterr().out
    assert "Checkpoint 12 is damaged" in said
    assert f"Resuming from step 8 in {copy}" in said
    assert contents(copy / "torn" / "12") == torn  # set aside, not deleted
    assert str(copy / "torn" / "12") in said.replace("\n", "")
    same(copy, straight)


def test_several_torn_checkpoints_fall_back_further(
    copy: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("8", "12"):
        TEARS["data cut short"](copy / "checkpoints" / step)
    run(copy)
    assert f"Resuming from step 4 in {copy}" in capsys.readouterr().out
    assert {p.name for p in (copy / "torn").iterdir()} == {"8", "12"}
    same(copy, straight)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_at_step_0(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_bytes()
    for step in finished_steps(copy):
        TEARS["clock gone"](copy / "checkpoints" / str(step))
    for _ in range(2):  # also not when it is started again, with the folder of checkpoints empty
        with pytest.raises(UserError) as error, watched() as seen:
            run(copy)
        assert "does not throw away its steps" in str(error.value)
        assert f"'{copy / 'torn'}': 12, 4, 8" in str(error.value)
        assert "another --workdir" in str(error.value) and "delete" in str(error.value)
        assert not seen.ids and (copy / "metrics.jsonl").read_bytes() == lines
    with pytest.raises(UserError, match="does not throw away its steps"):
        dry_run(block(), epath.Path(copy), False)


def test_a_run_without_any_checkpoint_begins_again_and_keeps_the_lines_it_replaces(
    copy: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    with watched() as seen:
        run(copy)
    assert "Resuming" not in capsys.readouterr().out
    assert len(seen.ids) == 12
    same(copy, straight)
    replaced = (copy / "metrics.jsonl.replaced-0").read_bytes()
    assert replaced == (straight / "metrics.jsonl").read_bytes()


# What fails, with which error, and the words of it that the user is to see.
READS: dict[str, tuple[Any, str, Exception, str]] = {
    "no permission": (
        metadata, "_load", PermissionError(13, "Permission denied", "x"), "Permission denied: 'x'",
    ),
    "a bad disk": (metadata, "_load", OSError(5, "Input/output error", "x"), "Input/output error"),
    "many files": (arrays, "_load", OSError(24, "Too many open files", "x"), "Too many open files"),
    "no answer": (arrays, "_load", TimeoutError(110, "Timed out", "x"), "Timed out"),
    "no memory": (arrays, "_read_part", MemoryError(), "MemoryError"),
    "no folder": (checkpoint, "_names", PermissionError(13, "Permission denied", "x"), "denied"),
    "a store's permission": (
        arrays, "_read_part", ValueError("UNKNOWN: Opening \"x\" [os_error_code='13'] [source locations=y]"),
        "UNKNOWN: Opening \"x\" [os_error_code='13']",
    ),
    "a store's disk": (
        arrays, "_open", ValueError("UNKNOWN: Reading \"x\" [os_error_code='5']"), "os_error_code='5'",
    ),
    "a store's answer": (arrays, "_open", ValueError("UNAVAILABLE: no answer"), "UNAVAILABLE: no answer"),
    "the device": (
        arrays, "_read_part", RuntimeError("INVALID_ARGUMENT: the device"), "INVALID_ARGUMENT: the device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", READS)
def test_a_failed_read_ends_the_run_with_its_cause_and_moves_nothing(
    copy: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, error, words = READS[what]
    before = contents(copy)

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(Unreadable, match="left as it is") as raised:
        run(copy)
    assert words in str(raised.value) and str(copy / "checkpoints") in str(raised.value)
    assert contents(copy) == before


def test_the_same_step_torn_twice_is_set_aside_twice(copy: Path, straight: Path) -> None:
    for _ in range(2):
        TEARS["clock gone"](copy / "checkpoints" / "12")
        run(copy)
    assert {p.name for p in (copy / "torn").iterdir()} == {"12", "12.1"}
    same(copy, straight)


def test_a_folder_that_is_still_being_written_is_no_checkpoint(half: Path, straight: Path) -> None:
    unfinished = half / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(half / "checkpoints" / "8", unfinished)
    run(half)
    same(half, straight)


def test_a_newer_format_is_refused_and_left_alone(copy: Path) -> None:
    path = copy / "checkpoints" / "12" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    before = contents(copy)
    with pytest.raises(UserError, match="format 99.*newer mmjax"):
        run(copy)
    assert contents(copy) == before


# --- resuming ----------------------------------------------------------------------------------


def test_going_on_reads_what_comes_next_and_ends_in_the_same_bits(
    half: Path, straight: Path
) -> None:
    with watched() as seen:
        run(half)
    tasks = Schedule.from_json(toyrun.meta(half)["clock"]["segments"]).sequence(8, 12)
    assert tasks == ["one", "one", "two", "one"] or set(tasks) == {"one", "two"}
    before = toyrun.meta_of(half, 8)["clock"]["positions"]
    for task in BATCH:
        mine = [i for t, batch in zip(tasks, seen.ids, strict=True) if t == task for i in batch]
        assert mine == ids(task, before[task], len(mine))
    same(half, straight)


def test_a_finished_run_says_so_and_changes_nothing(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    with watched() as seen:
        records = run(copy)
    assert f"Done: {copy} holds all 12 steps" in capsys.readouterr().out
    assert records == json.loads((copy / "results.json").read_text())
    assert not seen.ids
    assert contents(copy) == before


def test_a_finished_run_evaluates_what_its_config_has_gained(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new evaluator, or one with other settings; no step is done, and once evaluated it is done."""
    before, lines = toyrun.bits(copy), [x for x in deterministic(copy) if x["kind"] == "train"]
    source = "{'name': 'toy', 'count': 24}"
    more = f"tasks.two.evaluators.more={{'name': 'held_out_loss', 'source': {source}}}"
    with watched() as seen:
        records = run(copy, more)
        assert "All 12 steps are done; evaluating two.more." in capsys.readouterr().out
        assert records is not None and [r["count"] for r in records] == [16, 16, 24]
        assert json.loads((copy / "results.json").read_text()) == records
        assert run(copy, more) == records
        assert "Done: " in capsys.readouterr().out
        again = run(copy, more.replace("24", "20"))
        assert again is not None and again[-1]["count"] == 20
    assert not seen.ids and toyrun.bits(copy) == before
    assert [x for x in deterministic(copy) if x["kind"] == "train"] == lines


def test_a_run_killed_before_its_results_evaluates_only(copy: Path, straight: Path) -> None:
    (copy / "results.json").unlink()
    with watched() as seen:
        run(copy)
    assert not seen.ids
    same(copy, straight)


@pytest.mark.parametrize("content", ["", '[{"name"', "{}", "[5]", "null", "[" * 100_000])
def test_damaged_results_are_made_again(
    copy: Path, straight: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "results.json").write_text(content)
    with watched() as seen:
        run(copy)
    assert "results.json is damaged; writing it again" in capsys.readouterr().out.replace("\n", "")
    assert not seen.ids
    same(copy, straight)


def test_steps_without_a_line_in_the_metrics_are_named(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run continues: they cannot be recovered, and the state does not depend on them."""
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    left = [line for line in lines if json.loads(line)["step"] not in (2, 3, 5)]
    (half / "metrics.jsonl").write_text("".join(left))
    run(half)
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl lacks the lines of steps 2 to 3, 5; reports omit them." in said
    steps = [x["step"] for x in deterministic(half) if x["kind"] == "train"]
    assert steps == [0, 1, 4, 6, 7, 8, 9, 10, 11]


NAMES = ("0013", "²", "١٢", "1_3", "+13", "-3", "13 ", "1e1", "notes.txt", ".13")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_names_that_are_no_steps_are_left_alone(half: Path, straight: Path, kind: str) -> None:
    for name in NAMES:
        path = half / "checkpoints" / name
        path.mkdir() if kind == "folder" else path.write_text("x")
    (half / "checkpoints" / "13").write_text("a file under a step's name")
    run(half)
    assert {*NAMES, "13"} <= {p.name for p in (half / "checkpoints").iterdir()}
    assert not (half / "torn").exists()
    (half / "checkpoints" / "13").unlink()
    same(half, straight)


def test_a_step_that_is_a_link_is_read_and_not_deleted(half: Path, straight: Path) -> None:
    elsewhere = half.parent / "elsewhere"
    shutil.move(half / "checkpoints" / "8", elsewhere)
    (half / "checkpoints" / "8").symlink_to(elsewhere)
    shutil.rmtree(half / "checkpoints" / "4")
    before = contents(elsewhere)
    run(half, "checkpoint.keep=1", "checkpoint.every=2")
    assert checkpoint.steps(epath.Path(half)) == [12, 8]
    assert contents(elsewhere) == before
    assert toyrun.parameters(half).keys() == toyrun.parameters(straight).keys()
    for name, value in toyrun.parameters(half).items():
        assert np.array_equal(value, toyrun.parameters(straight)[name])


def test_a_run_killed_between_its_results_and_its_report_writes_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a report of an earlier end is there."""
    workdir, words = tmp_path / "run", ("log.report=True", "evaluation.every=0")
    run(workdir, "steps=1", *words)
    assert (workdir / "report.html").exists()
    with monkeypatch.context() as patched:
        patched.setattr(train, "write_report", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            run(workdir, "steps=2", *words)
    assert (workdir / "results.json").exists() and not (workdir / "report.html").exists()
    with watched() as seen:
        run(workdir, "steps=2", *words)
    assert not seen.ids and "2 of 2 steps" in (workdir / "report.html").read_text()


def test_more_steps_go_on(straight: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run(workdir, "steps=8")
    with watched() as seen:
        run(workdir, "steps=12")
    assert len(seen.ids) == 4
    assert toyrun.bits(workdir) == toyrun.bits(straight)
    assert (workdir / "results.json").read_bytes() == (straight / "results.json").read_bytes()
    # The shorter run evaluated at its end, the longer one had no reason to.
    extra = [line for line in deterministic(workdir) if line not in deterministic(straight)]
    assert {(line["kind"], line["step"]) for line in extra} == {("eval", 8)}
    assert [line for line in deterministic(workdir) if line not in extra] == deterministic(straight)


def test_another_mesh_is_announced_and_reads_the_same_examples(
    half: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched() as seen:
        run(half, devices=8)
    said = " ".join(capsys.readouterr().out.split())
    assert "may differ in rounding" in said and "devices 1 -> 8" in said
    with watched() as alone:
        shutil.rmtree(half / "checkpoints" / "12")
        run(half, devices=1)
    assert seen.ids == alone.ids and seen.sums == alone.sums
