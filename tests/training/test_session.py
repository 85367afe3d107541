"""Going on with a run: from torn checkpoints, after signals, under changed configs."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from harness import Aim, Harness, contents, deterministic, finished_steps, log
from metafile import edited
from toyrun import block, run, watched

from mmjax import train
from mmjax.core.errors import UserError
from mmjax.data import order
from mmjax.dry_run import dry_run
from mmjax.engine import arrays, checkpoint, metadata
from mmjax.engine.checkpoint import Checkpoints
from mmjax.engine.integrity import Unreadable
from mmjax.experiment import make_experiment
from mmjax.modalities.text import Text
from mmjax.schedule.schedule import Schedule
from mmjax.training import flight, loop
from mmjax.training.evaluation import Evaluation

BATCH = {"one": 8, "two": 16}
COUNT = 40


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps that nothing disturbed, with checkpoints 4, 8 and 12; copy it, do not change it."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(workdir)
    assert finished_steps(workdir) == (4, 8, 12)
    return workdir


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.fixture
def half(copy: Path) -> Path:
    """The run as it stood after 8 of its 12 steps."""
    shutil.rmtree(copy / "checkpoints" / "12")
    (copy / "results.json").unlink()
    return copy


def same(workdir: Path, other: Path) -> None:
    """Both ended in the same bits, and their metrics tell the same."""
    assert toyrun.bits(workdir) == toyrun.bits(other)
    assert deterministic(workdir) == deterministic(other)
    assert (workdir / "results.json").read_bytes() == (other / "results.json").read_bytes()


def ids(task: str, first: int, count: int) -> list[int]:
    """The examples at positions `first` to `first + count` of a task."""
    return [int(i) for i in order.example_ids(toyrun.SEED, task, first, count, COUNT)]


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
    assert f"Going on from step 8 in {copy}" in said
    assert contents(copy / "torn" / "12") == torn  # set aside, not deleted
    assert str(copy / "torn" / "12") in said.replace("\n", "")
    same(copy, straight)


def test_several_torn_checkpoints_fall_back_further(
    copy: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in ("8", "12"):
        TEARS["data cut short"](copy / "checkpoints" / step)
    run(copy)
    assert f"Going on from step 4 in {copy}" in capsys.readouterr().out
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
    assert "Going on" not in capsys.readouterr().out
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


# --- going on ----------------------------------------------------------------------------------


def test_going_on_reads_what_comes_next_and_ends_in_the_same_bits(
    half: Path, straight: Path
) -> None:
    with watched() as seen:
        run(half)
    tasks = Schedule.from_json(toyrun.meta(half)["clock"]["segments"]).strip(8, 12)
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
    assert "results.json is damaged: it is written again" in capsys.readouterr().out.replace(
        "\n", ""
    )
    assert not seen.ids
    same(copy, straight)


def test_steps_without_a_line_in_the_metrics_are_named(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the run goes on: they cannot be had again, and the state does not depend on them."""
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    left = [line for line in lines if json.loads(line)["step"] not in (2, 3, 5)]
    (half / "metrics.jsonl").write_text("".join(left))
    run(half)
    said = " ".join(capsys.readouterr().out.split())
    assert "metrics.jsonl lacks the lines of steps 2 to 3, 5: reports miss them." in said
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


# --- signals -----------------------------------------------------------------------------------


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """`raised(owner, name, number)`: SIGTERM comes when `owner.name` is called for the `number`-th time."""
    # Handlers are for the main thread; elsewhere the signal would end the whole test run.
    assert threading.current_thread() is threading.main_thread()

    def arm(owner: Any, name: str, number: int, after: bool = False) -> list[int]:
        calls, function = [0], getattr(owner, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == number and not after:
                signal.raise_signal(signal.SIGTERM)
            result = function(*arguments, **more)
            if calls[0] == number and after:
                signal.raise_signal(signal.SIGTERM)
            return result

        monkeypatch.setattr(owner, name, wrapped)
        return calls

    yield arm


# Where the signal comes; the step at which the run must then stand.
MOMENTS: dict[str, tuple[Any, str, int, bool, int]] = {
    "before the first step": (loop, "Loader", 1, False, 0),
    "in a step": (flight, "place", 3, False, 3),
    "in the last step before a checkpoint": (flight, "place", 4, False, 4),
    "in a save": (Checkpoints, "save", 1, False, 4),
    "after a save": (Checkpoints, "save", 1, True, 4),
    "in an evaluation": (Evaluation, "__call__", 1, False, 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_saves_and_going_on_ends_in_the_same_bits(
    tmp_path: Path,
    straight: Path,
    moment: str,
    raised: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, number, after, step = MOMENTS[moment]
    with monkeypatch.context():
        calls = raised(owner, name, number, after)
        assert run(tmp_path / "run") is None
        assert calls[0] >= number
    monkeypatch.undo()
    assert f"Stopped by SIGTERM; saved step {step}." in capsys.readouterr().out
    assert finished_steps(tmp_path / "run")[-1] == step
    assert not (tmp_path / "run" / "results.json").exists()
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(row["steps"] for row in told["tasks"]) == step and told["seconds"]["total"] > 0
    with watched() as seen:
        run(tmp_path / "run")
    assert len(seen.ids) == 12 - step
    same(tmp_path / "run", straight)


def test_sigterm_again_before_the_first_new_step(
    half: Path, straight: Path, raised: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised(loop, "Loader", 1)
    assert run(half) is None
    monkeypatch.undo()
    assert finished_steps(half)[-1] == 8
    run(half)
    same(half, straight)


def test_sigterm_before_an_evaluation_that_is_done_again_leaves_it(
    tmp_path: Path, raised: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart from step 8 evaluates there; one that is to stop does not begin to."""
    words = ("evaluation.every=4",)
    run(tmp_path / "straight", *words)
    workdir = Path(shutil.copytree(tmp_path / "straight", tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "12")
    (workdir / "results.json").unlink()
    raised(loop, "Loader", 1)
    assert run(workdir, *words) is None
    monkeypatch.undo()
    begun = [x for x in log(workdir) if x["attempt"] == 1 and x["line"] == "begin"]
    assert {x["phase"] for x in begun if "step" in x} == {"save"}
    run(workdir, *words)
    same(workdir, tmp_path / "straight")


def test_sigterm_in_the_last_evaluation_lets_the_run_end(
    half: Path, straight: Path, raised: Callable[..., list[int]]
) -> None:
    raised(Evaluation, "__call__", 1)
    assert run(half) is not None
    same(half, straight)


def test_sigterm_ends_the_process_with_status_3(
    tmp_path: Path, straight: Path, toy_command: Callable[..., Harness]
) -> None:
    harness = toy_command(tmp_path / "run")
    status, said = harness.ask(Aim("step", 2), signal.SIGTERM)
    assert status == train.STOPPED == 3, said
    step = finished_steps(tmp_path / "run")[-1]
    assert f"Stopped by SIGTERM; saved step {step}." in said and 4 <= step < 12
    run(tmp_path / "run")
    same(tmp_path / "run", straight)


# --- changed configs ---------------------------------------------------------------------------


def test_another_share_is_refused_with_words(half: Path) -> None:
    before = contents(half)
    with pytest.raises(UserError) as error:
        run(half, "tasks.one.share=1")
    assert "tasks.one.share (schedule): saved 2, now 1" in str(error.value)
    assert "--allow_change" in str(error.value)
    assert contents(half) == before


def test_another_share_starts_a_segment_and_keeps_every_place(half: Path) -> None:
    before = toyrun.meta(half)["clock"]
    with watched() as seen:
        run(half, "tasks.one.share=1", "tasks.two.share=3", "steps=20", allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    assert [s.start for s in schedule.segments] == [0, 8]
    assert schedule.segments[0] == Schedule.from_json(before["segments"]).segments[0]
    assert schedule.between(8, 20) == {"one": 3, "two": 9}
    for task, batch in BATCH.items():
        mine = _of(task, schedule.strip(8, 20), seen.ids)
        assert mine == ids(task, before["positions"][task], len(mine))
        assert clock["positions"][task] == before["positions"][task] + len(mine)
        assert len(mine) == batch * schedule.between(8, 20)[task]
    lines = [x for x in deterministic(half) if (x["kind"], x["task"]) == ("train", "two")]
    assert [line["visit"] for line in lines] == list(range(4 - 1 + 9))


def test_a_batch_that_changes_keeps_the_place(half: Path) -> None:
    """Positions count examples: visits times the batch would read others again."""
    before = toyrun.meta(half)["clock"]
    with watched() as seen:
        run(half, "tasks.one.batch=4", allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    mine = _of("one", schedule.strip(8, 12), seen.ids)
    assert mine == ids("one", before["positions"]["one"], len(mine)) and mine
    assert clock["positions"]["one"] == before["positions"]["one"] + len(mine)


def test_a_second_change_starts_a_third_segment(half: Path) -> None:
    run(half, "tasks.one.share=1", "steps=16", allow_change=True)
    run(half, "tasks.one.share=5", "steps=22", allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    assert [s.start for s in schedule.segments] == [0, 8, 16]
    assert schedule.between(16, 22) == {"one": 5, "two": 1}
    assert clock["positions"] == {t: n * BATCH[t] for t, n in schedule.visits(22).items()}


def test_a_task_that_is_added_leaves_the_others_where_they_stood(half: Path) -> None:
    before, held = toyrun.meta(half)["clock"], toyrun.parameters(half)
    config = block()
    config["tasks"]["three"] = {**config["tasks"]["one"], "share": 1}
    with watched() as seen:
        run(half, "steps=20", config=config, allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    assert schedule.between(8, 20) == {"one": 6, "two": 3, "three": 3}
    for task in ("one", "two"):
        mine = _of(task, schedule.strip(8, 20), seen.ids)
        assert mine == ids(task, before["positions"][task], len(mine))
    new = _of("three", schedule.strip(8, 20), seen.ids)
    assert new == ids("three", 0, 24) and clock["positions"]["three"] == 24
    after = toyrun.parameters(half)
    assert after.keys() - held.keys() == {"heads/three/out/bias", "heads/three/out/kernel"}


def test_what_a_checkpoint_holds_survives_an_added_task(half: Path) -> None:
    """A rate of zero leaves the parameters as they came: the saved ones, and fresh ones for the new head."""
    held = toyrun.parameters(half)
    config = block("optimizer.learning_rate=0.0")
    config["tasks"]["three"] = config["tasks"]["one"]
    run(half, config=config, allow_change=True)
    after = toyrun.parameters(half)
    assert held and all(np.array_equal(after[n], held[n]) for n in held)
    assert np.abs(after["heads/three/out/kernel"]).min() > 0


def test_a_task_that_is_removed_and_comes_back_goes_on_where_it_stood(half: Path) -> None:
    before = toyrun.meta(half)["clock"]
    less = block("steps=14")
    del less["tasks"]["two"]
    with watched() as seen:
        run(half, config=less, allow_change=True)
    alone = [i for batch in seen.ids for i in batch]
    assert alone == ids("one", before["positions"]["one"], 6 * 8)
    assert toyrun.meta(half)["clock"]["positions"]["two"] == before["positions"]["two"]
    assert not any(n.startswith("heads/two") for n in toyrun.parameters(half))
    with watched() as seen:
        run(half, "steps=20", allow_change=True)
    schedule = Schedule.from_json(toyrun.meta(half)["clock"]["segments"])
    mine = _of("two", schedule.strip(14, 20), seen.ids)
    assert mine == ids("two", before["positions"]["two"], 32)
    more = _of("one", schedule.strip(14, 20), seen.ids)
    assert more == ids("one", before["positions"]["one"] + 48, 32)


def test_a_saved_phase_plan_goes_on_and_a_new_one_takes_over(half: Path) -> None:
    config = block("steps=24")
    config["schedule"] = {"phases": [{"start": 16, "weights": {"one": 0, "two": 1}}]}
    run(half, config=config, allow_change=True)
    schedule = Schedule.from_json(toyrun.meta(half)["clock"]["segments"])
    assert schedule.strip(16, 24) == ["two"] * 8
    assert schedule.between(0, 16)["one"] > 8


def test_a_structural_change_is_refused_and_shown(half: Path) -> None:
    before = contents(half)
    with pytest.raises(UserError) as error:
        run(half, "model.width=16", "steps=20", allow_change=True)
    assert "model.width (structural): saved 8, now 16" in str(error.value)
    assert "steps" not in str(error.value).split("\n", 1)[1]
    assert "--workdir" in str(error.value)
    assert contents(half) == before


def test_other_data_under_the_same_config_is_refused(tmp_path: Path) -> None:
    from mmjax.sources.toy import values  # found once toyrun.block has added the folder

    file = tmp_path / "values.npy"
    np.save(file, values(COUNT))
    mine = (f"tasks.two.source.file={file}", "steps=4")
    run(tmp_path / "run", *mine)
    changed = values(COUNT)
    changed[3, 0, 0] += 1
    np.save(file, changed)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", *mine, "steps=8", allow_change=True)
    assert "data" in str(error.value) and "tasks.two.source" in str(error.value)
    assert "tasks.one" not in str(error.value)
    assert contents(tmp_path / "run") == before


def test_what_a_run_began_with_is_kept_once_and_written_where_it_changes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that lies outside of the data: copied, never written where it lies, and loaded from the copy."""
    mine = tmp_path / "mine" / "tokenizer.model"
    mine.parent.mkdir()
    mine.write_bytes(bytes(range(256)))
    workdir = tmp_path / "run"
    # The modality that the tasks read, with the files of a text.
    files_of = lambda self: Text(folder=self.folder, tokenizer=str(mine)).files()  # noqa: E731
    toy = type(make_experiment(block()).modalities["toy"])
    monkeypatch.setattr(toy, "files", files_of)

    def marks() -> dict[str, tuple[int, int]]:
        files = [mine, workdir / "config.json", *(workdir / "assets").rglob("*.model")]
        return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}

    original = (mine.stat().st_ino, mine.stat().st_mtime_ns)
    run(workdir, "steps=4")
    assert (mine.stat().st_ino, mine.stat().st_mtime_ns) == original
    [kept] = (workdir / "assets").rglob("*.model")
    assert kept.read_bytes() == bytes(range(256)) and not kept.samefile(mine)
    before = marks()
    run(workdir, "steps=4")
    assert marks() == before
    run(workdir, "steps=8")
    assert json.loads((workdir / "config.json").read_text())["steps"] == 8
    changed = {name for name, mark in marks().items() if mark != before[name]}
    assert changed == {"config.json"}
    mine.unlink()
    experiment = make_experiment(toyrun.meta(workdir)["config"], str(workdir / "assets"))
    assert [str(p) for p in experiment.modalities["toy"].files().values()] == [str(kept)]


def test_a_config_that_is_refused_is_not_written(half: Path) -> None:
    before = (half / "config.json").read_bytes()
    with pytest.raises(UserError):
        run(half, "tasks.one.share=3")
    assert (half / "config.json").read_bytes() == before
    run(half, "tasks.one.share=3", allow_change=True)
    assert json.loads((half / "config.json").read_text())["tasks"]["one"]["share"] == 3


def test_shapes_that_do_not_fit_are_named(copy: Path) -> None:
    """A checkpoint whose arrays are not what its own config makes, as after a change of the code."""
    with edited(copy, 12) as meta:
        meta["config"]["model"]["width"] = 16
    before = contents(copy)
    with pytest.raises(UserError) as error:
        run(copy, "model.width=16")
    said = str(error.value)
    assert "parameters/heads/one/out/kernel: expected float32[16, 1], found float32[8, 1]" in said
    assert str(copy / "checkpoints" / "12") in said
    assert contents(copy) == before


def _of(task: str, tasks: list[str], batches: list[list[int]]) -> list[int]:
    """The examples of one task, in order."""
    return [i for t, batch in zip(tasks, batches, strict=True) if t == task for i in batch]


def test_a_checkpoint_names_everything_a_run_is(straight: Path) -> None:
    meta = toyrun.meta(straight)
    assert meta["config"] == block()
    assert meta["clock"]["step"] == 12
    assert meta["clock"]["positions"] == {"one": 64, "two": 64}
    code = {f"code.{kind}/toy" for kind in ("blocks", "modalities", "objectives", "sources")}
    held_out = 'held-out {"count": 16, "name": "toy"}'
    sources = {"tasks.one.source", "tasks.two.source", held_out}
    assert set(meta["identities"]) == {*sources, *code}
    assert {"jax", "numpy", "mesh", "cores", "processor"} <= meta["environment"].keys()
    assert meta["environment"]["python"] == sys.version.split()[0]
    state = checkpoint.read_shapes(epath.Path(straight), 12)
    assert set(state) == {"parameters", "optimizer"}


def test_a_modality_that_no_task_reads_needs_no_files(tmp_path: Path) -> None:
    """Such as texts without a tokenizer, where the tasks on texts were taken out of a config."""
    run(tmp_path / "run", "steps=1", "modalities.text={'name': 'text', 'vocabulary': 8}")
    identities = toyrun.meta(tmp_path / "run")["identities"]
    assert "tasks.one.source" in identities
    assert not [name for name in identities if name.startswith("modalities.")]
    assert not (tmp_path / "run" / "assets").exists()


def test_averages_may_begin_later(tmp_path: Path) -> None:
    """At the parameters as they stand, not at new random ones."""
    workdir = tmp_path / "run"
    run(workdir, "steps=4")
    before = toyrun.parameters(workdir)
    run(workdir, "steps=5", "optimizer.ema=0.5", allow_change=True)
    after, folder = toyrun.parameters(workdir), epath.Path(workdir)
    shapes = checkpoint.read_shapes(folder, 5)["buffers"]
    abstract = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in shapes.items()}
    averages = checkpoint.read_state(folder, 5, {"buffers": abstract})["buffers"]
    assert {name.removeprefix("ema/") for name in averages} == set(after)
    for name, value in after.items():
        expected = (before[name] + value) / 2
        np.testing.assert_allclose(averages[f"ema/{name}"], expected, rtol=1e-6)
