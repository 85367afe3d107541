"""Data of a run's folder in the form that the report needs; readable at any time of the run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.workdir import EVALUATIONS, GOODPUT, METRICS, RESULTS
from mmjax.engine import checkpoint
from mmjax.monitor import metrics
from mmjax.monitor import summary as tally
from mmjax.monitor.line_file import read_records
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.phase_specs import from_config
from mmjax.schedule.rules.base import rule_of
from mmjax.schedule.schedule import Schedule

_NOT_MEASURES = ("kind", "step", "task", "visit", "timing")


@dataclass(frozen=True)
class Visits:
    """The steps of one task.

    Attributes:
      step: which they were, `[V]`.
      values: each measure `[V]`, NaN where a line lacks it; `seconds` and `wait` among them.
      examples: of each step `[V]`; the config's batch where a line lacks them, 0 where that lacks it too.
      usage: `"LAYER MODALITY"` -> each expert's part of the tokens `[V', E]`, of the visits that logged it.
    """

    step: np.ndarray
    values: Mapping[str, np.ndarray]
    examples: np.ndarray
    usage: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, name: str) -> np.ndarray:
        """Return a measure `[V]`, NaN where it is not known."""
        return self.values.get(name, np.full(len(self.step), np.nan))

    @property
    def rates(self) -> np.ndarray:
        """Examples per second of each step, `[V]`."""
        seconds = self.of("seconds")
        return np.where(seconds > 0, self.examples / np.where(seconds > 0, seconds, 1), np.nan)


@dataclass(frozen=True)
class Run:
    """A run, as far as its folder shows it.

    Attributes:
      config: as plain data; empty where there is none.
      meta: of the newest checkpoint that can be read; None where there is none.
      meta_step: its step, 0 where there is none.
      tasks: by name, first those that ran, in the order of their first step.
      order: the task of each step that `metrics.jsonl` holds.
      records: the newest results.
      records_step: complete steps when they were taken; None where that is not known.
      history: earlier values and the newest, by (task, evaluator, split, name).
      log: the lines of `goodput.jsonl`.
      summary: what the run did and cost, as `tally.summary` gives it: of a finished run that of its end, which the
        terminal showed and `summary.json` holds; of others up to now.
      evaluations: records of `mmjax evaluate`, in the order in which they were taken.
    """

    workdir: epath.Path
    config: dict[str, Any]
    meta: dict[str, Any] | None
    meta_step: int
    tasks: dict[str, Visits]
    order: list[str]
    records: list[dict[str, Any]]
    records_step: int | None
    history: dict[tuple[str, ...], list[float]]
    log: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's."""
        return self.workdir.name or str(self.workdir)

    @property
    def step(self) -> int:
        """Complete steps."""
        ends = [int(v.step[-1]) + 1 for v in self.tasks.values() if len(v.step)]
        return max([self.meta_step, *ends])

    @property
    def is_done(self) -> bool:
        steps = self.config.get("steps")
        return steps is not None and self.step >= steps and bool(self.records)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by activity, as `goodput.summary` gives them."""
        seconds: dict[str, float] = self.summary["seconds"]
        return seconds

    def row(self, task: str) -> Mapping[str, Any]:
        """Return what a task did and cost, as `tally.task_rows` gives it; empty where it has not run."""
        return next((row for row in self.summary["tasks"] if row["task"] == task), {})

    def schedule(self) -> Schedule | None:
        """Return the schedule of the newest checkpoint, else that of the config."""
        try:
            if self.meta is not None:
                return Schedule.from_json(self.meta["clock"]["segments"])
            block = self.config.get("schedule", {})
            weights, intervals = (
                {n: t.get(key, 1) for n, t in self.config["tasks"].items()}
                for key in ("weight", "interval")
            )
            phases = [
                configs.build(PhaseConfig, phase, "phases") for phase in block.get("phases", ())
            ]
            rule, seed = block.get("rule", "shares"), self.config.get("seed", 0)
            return from_config(rule, weights, seed, phases, intervals=intervals)
        except (UserError, KeyError, TypeError, AttributeError):
            return None  # a config of another version: the rest of the page can do without


def read_run(workdir: epath.Path) -> Run:
    """Read a run's folder.

    Raises:
      UserError: the folder holds no run, or a file of it is broken in the middle.
    """
    lines = metrics.read(workdir)
    meta_step, meta = newest_meta(workdir)
    config = (meta or {}).get("config") or _json(workdir / "config.json") or {}
    if not lines and not config:
        raise UserError(f"No run in '{workdir}': it has neither config.json nor {METRICS}.")
    train = [line for line in lines if line.get("kind") == "train"]
    evals = [line for line in lines if line.get("kind") == "eval"]
    records, records_step = _records(workdir, evals, train, config)
    return Run(
        workdir,
        config,
        meta,
        meta_step,
        _tasks(train, config),
        [line["task"] for line in train],
        records,
        records_step,
        _history(evals),
        _log(workdir),
        _summary(workdir, config.get("steps")),
        _evaluations(workdir),
    )


def _summary(workdir: epath.Path, steps: Any) -> dict[str, Any]:
    """Return the summary that a finished run ended with; of any other run, or without that file, one up to now."""
    saved = tally.read(workdir)
    return saved if "step" in saved and saved["step"] == steps else tally.summary(workdir, {})


def wanted_shares(schedule: Schedule, steps: int) -> dict[str, float]:
    """Return the share of steps [0, steps) that the weights of each segment ask for; they sum to 1."""
    shares: dict[str, float] = defaultdict(float)
    ends = [segment.start for segment in schedule.segments[1:]] + [steps]
    for segment, end in zip(schedule.segments, ends, strict=True):
        active = {task: weight for task, weight in segment.weights.items() if weight}
        counts = rule_of(segment.rule).counts(list(active.values()))
        length = max(min(end, steps) - segment.start, 0)
        for task, count in zip(active, counts, strict=True):
            shares[task] += length * count / sum(counts) / max(steps, 1)
    return dict(shares)


def _tasks(train: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Visits]:
    blocks = config.get("tasks", {})
    lines: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in train:
        lines[line["task"]].append(line)
    names = [*lines, *(name for name in blocks if name not in lines)]
    return {n: _visits(lines.get(n, []), blocks.get(n, {}).get("batch", 0)) for n in names}


def _visits(lines: Sequence[Mapping[str, Any]], batch: int) -> Visits:
    rows = [{**line.get("timing", {}), **line} for line in lines]
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_MEASURES)
    values = {n: np.array([_number(row.get(n)) for row in rows]) for n in sorted(names)}
    known = {name: column for name, column in values.items() if not np.isnan(column).all()}
    # A loss that was never a number is still a loss.
    known |= {name: values[name] for name in ("loss", "grad_norm") if name in values}
    usages: dict[str, list[Any]] = defaultdict(list)
    for name, value in (item for line in lines for item in line.items()):
        if name.startswith(metrics.USAGE):
            usages[name.removeprefix(metrics.USAGE)].append(value)
    usage = {name: np.array(shares, float) for name, shares in usages.items()}
    examples = np.array([line.get("examples", batch) for line in lines], np.int64)
    steps = np.array([line["step"] for line in lines], np.int64)
    return Visits(steps, known, examples, usage)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _records(
    workdir: epath.Path,
    evals: Sequence[dict[str, Any]],
    train: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], int | None]:
    """Return the newest results: of the last evaluation, or of `results.json` where the run is at its end.

    `mmjax evaluate` of version 0.1 may have written that file later, and for another step.
    """
    step = max((line["step"] for line in evals), default=None)
    done = train[-1]["step"] + 1 if train else 0
    path = workdir / RESULTS
    records = _json(path) if step is None or done >= config.get("steps", 0) else None
    if (
        isinstance(records, list)
        and records
        and all(isinstance(record, dict) for record in records)
    ):
        records = [metrics.revived(record) for record in records]
        same = [_without(e, "kind", "step") for e in evals[-len(records) :]]
        is_same = [_without(e, "step") for e in records] == same
        return records, step if is_same else records[0].get("step")
    return [line for line in evals if line["step"] == step], step


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def _evaluations(workdir: epath.Path) -> list[dict[str, Any]]:
    """Return the records that `mmjax evaluate` has appended."""
    path = workdir / EVALUATIONS
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with suppress(ValueError):  # being written
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(metrics.revived(record))
    return records


def _history(evals: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[float]]:
    history: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for line in evals:
        history[key_of(line)].append(_number(line.get("value")))
    return dict(history)


def key_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the name of a result: task, evaluator, split and measure."""
    return tuple(str(record.get(name, "")) for name in ("task", "evaluator", "split", "name"))


def newest_meta(workdir: epath.Path) -> tuple[int, dict[str, Any] | None]:
    """Return step and metadata of the newest checkpoint whose metadata can be read; (0, None) for none."""

    def readable(step: int) -> tuple[int, dict[str, Any]] | None:
        try:
            return step, checkpoint.read_meta(workdir, step)
        except (UserError, ValueError):
            return None  # torn, of a newer version, or removed by the run just now

    return checkpoint.newest(workdir, readable) or (0, None)


def _json(path: epath.Path) -> Any:
    try:
        # In a record of its own, so that a list of records is revived as well.
        return metrics.revived({"": json.loads(path.read_text())})[""]
    except (OSError, ValueError):
        return None  # not there yet, or being written


def _log(workdir: epath.Path) -> list[dict[str, Any]]:
    records = read_records(workdir / GOODPUT)
    return [record for record in records if isinstance(record.get("time"), int | float)]
