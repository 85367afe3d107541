"""Check what a run did and cost: by hand from lines, and of a real run that was interrupted."""

from __future__ import annotations

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import toyrun
from etils import epath
from toyrun import run

from mmjax.core.workdir import SUMMARY
from mmjax.monitor import goodput, metrics, summary
from mmjax.monitor.tables import summary_tables

FLOPS = {"a": 8.0, "b": 30.0}


def line(step: int, task: str, seconds: float, **values: Any) -> dict[str, Any]:
    made = {"kind": "train", "step": step, "task": task, "loss": 1.0, "grad_norm": 2.0, "visit": 7}
    timing = {"seconds": seconds, "wait": seconds / 4}
    return {**made, "examples": 4, "tokens": 12, "timing": timing, **values}


def test_a_row_by_hand() -> None:
    lines = [line(0, "a", 1.0), line(1, "b", 3.0), line(2, "a", 2.0, visit=8, loss=math.nan)]
    a, b = summary.task_rows(lines, FLOPS, wall=12.0, peak=32.0)
    assert a == {
        "task": "a", "steps": 2, "visits": 9, "skipped": 1, "examples": 8, "tokens": 24, "loss": 1.0,
        "grad_norm": 2.0, "step_seconds": 1.5, "wait_seconds": 0.375, "flops": 8.0,
        "flops_per_second": 16 / 3, "mfu": 16 / 3 / 32, "seconds_in_all": 3.0, "share": 0.25,
    }  # fmt: skip
    assert (b["task"], b["share"], b["mfu"]) == ("b", 0.25, 10 / 32)
    assert "mfu" not in summary.task_rows(lines, FLOPS, wall=12.0)[0]


def test_padding_is_no_token() -> None:
    """Of 12 positions a step, 9 and 6 hold a token: 15 of 24, in 3 seconds. Lines of earlier versions do not count."""
    lines = [line(0, "a", 1.0, valid_tokens=9.0), line(1, "a", 2.0, valid_tokens=6.0)]
    [row] = summary.task_rows([*lines, line(2, "a", 7.0)], FLOPS, wall=12.0)
    told = {name: row[name] for name in ("tokens", "valid_tokens", "padding", "tokens_per_second")}
    assert told == {"tokens": 36, "valid_tokens": 15, "padding": 0.375, "tokens_per_second": 5.0}
    assert "padding" not in summary.task_rows([line(2, "a", 7.0)], FLOPS, wall=12.0)[0]


def test_a_gradient_that_is_not_finite_is_a_step_without_update() -> None:
    [row] = summary.task_rows(
        [line(0, "a", 1.0, grad_norm=math.inf), line(1, "a", 1.0)], FLOPS, 1.0
    )
    assert row["skipped"] == 1


def test_the_loss_of_a_task_is_that_of_its_latest_visits() -> None:
    lines = [line(i, "a", 1.0, loss=100.0 if i < 15 else float(i)) for i in range(25)]
    assert summary.task_rows(lines, FLOPS, 1.0)[0]["loss"] == sum(range(15, 25)) / 10
    [row] = summary.task_rows([line(0, "a", 1.0, loss=math.nan)], FLOPS, 1.0)
    assert row["loss"] is None and row["skipped"] == 1


def test_switch_cost_is_between_neighbours() -> None:
    """Step 9 begins a run again: what ran before it is not known."""
    tasks, seconds = "aabaabaab", [9, 1, 5, 3, 1, 5, 3, 1, 5]
    lines = [line(i, t, float(s)) for i, (t, s) in enumerate(zip(tasks, seconds, strict=True))]
    lines += [line(i + 10, "a", s) for i, s in enumerate([50.0, 1.0])] + [line(12, "b", 5.0)]
    lines.append(line(13, "a", 3.5))
    a, b = summary.task_rows(lines, FLOPS, 1.0)
    assert a["switch_seconds"] == 2.0  # medians of 3, 3, 3.5 and of 1, 1, 1, 1
    assert "switch_seconds" not in b  # never ran twice in a row
    assert summary.switch_cost([1, 2, 3, 4, 5], [True, True, False, False, False]) is None


def test_rates_without_time_or_flops() -> None:
    assert summary.rates(0, 1, 1e12) == summary.rates(1, 0, 1e12) == {}
    assert summary.rates(6.0, 2.0, None) == {"flops_per_second": 3.0}


def test_an_interrupted_run_sums_up_as_one_that_was_not(tmp_path: Path) -> None:
    straight, again = tmp_path / "straight", tmp_path / "again"
    run(straight)
    run(again)
    shutil.rmtree(again / "checkpoints" / "12")
    (again / "results.json").unlink()
    run(again)
    one, two = (json.loads((w / SUMMARY).read_text()) for w in (straight, again))
    for key in ("steps", "visits", "skipped", "examples", "tokens", "loss", "grad_norm", "flops"):
        assert [row[key] for row in one["tasks"]] == [row[key] for row in two["tasks"]], key
    positions = toyrun.meta(straight)["clock"]["positions"]
    assert {row["task"]: row["examples"] for row in one["tasks"]} == positions
    assert {row["task"]: row["tokens"] for row in one["tasks"]} == {
        "one": 2 * positions["one"], "two": 3 * positions["two"],
    }  # fmt: skip
    # The second attempt did steps 8 to 11 again.
    assert "repeated" not in one["seconds"] and two["seconds"]["repeated"] > 0
    assert (one["seconds"]["attempts"], two["seconds"]["attempts"]) == (1, 2)
    for found in (one, two):
        useful = found["seconds"]["step"]
        assert found["goodput"] == pytest.approx(useful / found["seconds"]["total"])
        assert sum(row["share"] for row in found["tasks"]) < 1
    assert goodput.summary(epath.Path(again))["total"] >= two["seconds"]["total"]


def test_shares_of_phases_add_up_to_one_whatever_their_names() -> None:
    seconds = {"step": 30.0, "mine": 10.0, "other": 10.0, "total": 50.0, "attempts": 2.0}
    rows = goodput.rows({**seconds, "unfinished": 1.0})
    assert [(row["label"], row["share"]) for row in rows] == [
        ("steps that count (goodput)", 0.6), ("between these", 0.2), ("mine", 0.2),
    ]  # fmt: skip
    assert goodput.goodput(seconds) == 0.6
    assert goodput.share_of_time(1.0, 0.0) == 0.0


def test_the_peak_is_known_from_the_lines(tmp_path: Path) -> None:
    """A report that is written elsewhere knows no chip: it divides by what the steps were divided by."""
    timing = {"seconds": 2.0, "wait": 0.0, "flops_per_second": 6.0, "mfu": 0.25}
    with metrics.MetricWriter(epath.Path(tmp_path), 0) as writer:
        for step in range(2):
            writer.write(step, "a", {"loss": 1.0, "visit": step}, timing)
    found = summary.summary(epath.Path(tmp_path), {})
    assert (found["step"], found["mfu"], found["tasks"][0]["mfu"]) == (2, 0.25, 0.25)


def test_tables_at_the_end() -> None:
    seconds = {"step": 60.0, "wait_data": 20.0, "repeated": 0.0, "other": 20.0, "total": 100.0}
    lines = [line(0, "a", 0.5, valid_tokens=9.0), line(1, "b", 30.0)]
    rows = summary.task_rows(lines, FLOPS, 100.0, peak=32.0)
    rows[1]["switch_seconds"] = -0.002
    stream = StringIO()
    summary_tables({"seconds": {**seconds, "attempts": 2.0}, "tasks": rows}, stream)
    assert stream.getvalue().splitlines() == [
        "Tasks (tokens without padding; loss, gradient norm: mean of last 10 visits)",
        "task  visits  examples  tokens  padding  loss  gradient  skipped",
        "----------------------------------------------------------------",
        "a          8         4       9   25.0 %  1.00      2.00",
        "b          8         4       -        -  1.00      2.00",
        "",
        "Steps (switch: longer after another task than after the same)",
        "task  a step   wait  switch  tokens/s  FLOP/s     MFU  of time",
        "--------------------------------------------------------------",
        "a      500ms  125ms       -        18      16  50.0 %   0.50 %",
        "b      30.0s   7.5s    -2ms         -       1   3.1 %   30.0 %",
        "",
        "Time (1m40s in 2 attempts)",
        "spent on                     time   share",
        "-----------------------------------------",
        "steps that count (goodput)  1m00s  60.0 %",
        "waiting for data            20.0s  20.0 %",
        "between these               20.0s  20.0 %",
        "",
    ]
