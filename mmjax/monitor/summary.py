"""The summary of a run: each task's work and cost, and how the run spent its time: `summary.json`."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mmjax.core.files import replace_file
from mmjax.core.workdir import SUMMARY
from mmjax.monitor import goodput, metrics
from mmjax.monitor.metrics import strict

LATEST = 10  # visits whose mean is a task's loss
_ENOUGH = 3  # steps of either kind, of which a switch cost is the difference


def rates(flops: float, seconds: float, peak: float | None) -> dict[str, float]:
    """Return `flops_per_second` of model FLOPs in a time and, if the `peak` FLOP/s is known, `mfu`."""
    if not (flops > 0 and seconds > 0):
        return {}
    result = {"flops_per_second": flops / seconds}
    return result if peak is None else {**result, "mfu": flops / seconds / peak}


def summary(
    workdir: epath.Path, flops: Mapping[str, float], peak: float | None = None
) -> dict[str, Any]:
    """Return the summary of a run so far, over all its attempts.

    Args:
      workdir: with `metrics.jsonl` and `goodput.jsonl`.
      flops: model FLOPs of a step, per task, for steps whose lines do not state them.
      peak: FLOP/s of all the run's devices together, where it is known.

    Returns:
      `step` (complete steps), `seconds` by activity as `goodput.summary` has them, `goodput` (the share of useful
      steps in it), `flops_per_second` and `mfu` over the useful steps, and `tasks`: the rows of `task_rows`.
    """
    seconds = goodput.summary(workdir)
    lines = [line for line in metrics.read(workdir) if line.get("kind") == "train"]
    peak = peak or _peak(lines)
    rows = task_rows(lines, flops, seconds["total"], peak)
    done = sum(row["flops"] * row["steps"] for row in rows)
    spent = sum(row["seconds_in_all"] for row in rows if row["flops"])
    return {
        "step": lines[-1]["step"] + 1 if lines else 0,
        "goodput": goodput.goodput(seconds),
        **rates(done, spent, peak),
        "seconds": seconds,
        "tasks": rows,
    }


def task_rows(
    lines: Iterable[Mapping[str, Any]],
    flops: Mapping[str, float],
    wall: float,
    peak: float | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each task that ran, in the order of their first steps.

    Keys: `task`, `steps`, `visits`, `skipped` (without update), `examples`, `tokens` (positions, padding
    included), `valid_tokens`, `padding` and `tokens_per_second` (see `occupancy`), `loss` and
    `grad_norm` (means of the latest visits), `step_seconds` (median), `wait_seconds` (mean, for the
    loader), `switch_seconds` (see `switch_cost`), `flops` (of a step, mean), `flops_per_second`, `mfu`,
    `seconds_in_all`, `share` of the `wall` seconds. What is not known is missing.
    """
    tasks: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    after_other: dict[str, list[bool | None]] = defaultdict(list)
    before: Mapping[str, Any] | None = None
    for line in lines:
        if line.get("kind") != "train":
            continue
        follows = before is not None and before["step"] + 1 == line["step"]
        switched = before["task"] != line["task"] if follows and before else None
        after_other[line["task"]].append(switched)
        tasks[line["task"]].append(line)
        before = line
    return [
        _row(task, history, after_other[task], flops.get(task, 0.0), wall, peak)
        for task, history in tasks.items()
    ]


def _row(
    task: str,
    lines: Sequence[Mapping[str, Any]],
    after_other: Sequence[bool | None],
    flops: float,
    wall: float,
    peak: float | None,
) -> dict[str, Any]:
    timings = [line.get("timing", {}) for line in lines]
    seconds = [timing.get("seconds", 0.0) for timing in timings]
    # A phase may give a task other shapes: each step states its own.
    step_flops = [t["flops_per_second"] * t["seconds"] for t in timings if "flops_per_second" in t]
    flops = statistics.fmean(step_flops) if step_flops else flops
    switch = switch_cost(seconds, after_other)
    return {
        "task": task,
        "steps": len(lines),
        "visits": lines[-1].get("visit", len(lines) - 1) + 1,
        "skipped": sum(
            not all(math.isfinite(line.get(name, 0.0)) for name in ("loss", "grad_norm"))
            for line in lines
        ),
        "examples": sum(line.get("examples", 0) for line in lines),
        "tokens": sum(line.get("tokens", 0) for line in lines),
        **occupancy(lines),
        **{name: latest(line.get(name) for line in lines) for name in ("loss", "grad_norm")},
        "step_seconds": statistics.median(seconds),
        "wait_seconds": statistics.fmean(line.get("timing", {}).get("wait", 0.0) for line in lines),
        **({} if switch is None else {"switch_seconds": switch}),
        "flops": flops,
        **rates(flops * len(lines), sum(seconds), peak),
        "seconds_in_all": sum(seconds),
        "share": goodput.share_of_time(sum(seconds), wall),
    }


def occupancy(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Count the valid tokens of steps that report them; nothing where none does, as in runs of earlier versions.

    Returns:
      `valid_tokens`, `padding`, the share of positions without one, and `tokens_per_second`, of valid tokens alone.
    """
    counted = [line for line in lines if line.get("tokens") and "valid_tokens" in line]
    if not counted:
        return {}
    valid, positions = (sum(line[name] for line in counted) for name in ("valid_tokens", "tokens"))
    seconds = sum(line.get("timing", {}).get("seconds", 0.0) for line in counted)
    return {
        "valid_tokens": round(valid),
        "padding": 1 - valid / positions,
        **({"tokens_per_second": valid / seconds} if seconds > 0 else {}),
    }


def switch_cost(seconds: Sequence[float], after_other: Sequence[bool | None]) -> float | None:
    """Return how many seconds longer the median step after another task is than after the same task.

    Args:
      seconds: of a task's steps.
      after_other: for each, whether another task ran just before; None where that is not known.

    Returns:
      The difference, which noise may make negative; None with fewer than three steps of either kind.
    """
    pairs = list(zip(seconds, after_other, strict=True))
    kinds = [[s for s, other in pairs if other is kind] for kind in (True, False)]
    if min(map(len, kinds)) < _ENOUGH:
        return None
    return statistics.median(kinds[0]) - statistics.median(kinds[1])


def write(workdir: epath.Path, data: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all."""
    replace_file(workdir / SUMMARY, json.dumps(strict(data), indent=1, allow_nan=False))


def read(workdir: epath.Path) -> dict[str, Any]:
    """Return what `write` has written; empty where there is none, or it is damaged."""
    try:
        saved = json.loads((workdir / SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) and isinstance(saved.get("tasks"), list) else {}


def scalars(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary by name: `run/goodput`, `run/mfu`, `run/TASK/mfu` and so on."""
    names = ("goodput", "flops_per_second", "mfu")
    of_each = (
        "step_seconds",
        "switch_seconds",
        "tokens_per_second",
        "padding",
        *names[1:],
        "share",
    )
    of_run = {f"run/{name}": data[name] for name in names if name in data}
    of_tasks = {
        f"run/{row['task']}/{name}": row[name]
        for row in data["tasks"]
        for name in of_each
        if name in row
    }
    return of_run | of_tasks


def latest(values: Iterable[float | None]) -> float | None:
    """Return the mean of the latest ten finite values; None where there is none."""
    finite = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return statistics.fmean(finite[-LATEST:]) if finite else None


def _peak(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the peak FLOP/s that the latest line with an `mfu` was divided by; None if there is none."""
    timings = [line["timing"] for line in lines if line.get("timing", {}).get("mfu")]
    return timings[-1]["flops_per_second"] / timings[-1]["mfu"] if timings else None
