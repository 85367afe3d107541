"""Shares of time: the rule `budget`, whose measured step times enter a run as integers only.

The shares of steps that give each task its share of the time follow first from model FLOPs; with
`schedule.rebalance_every`, they are set again at this interval from measured step times. That is decided
by process 0 and written to `WORKDIR/segments.jsonl` before a step runs under it. A run that was
killed and comes to that step again takes what is written there, so that it ends in the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mmjax.core import config as configs
from mmjax.core.workdir import SEGMENTS
from mmjax.engine.state import Clock
from mmjax.experiment import Experiment
from mmjax.monitor import metrics
from mmjax.monitor.line_file import LineFile, read_records
from mmjax.run_config import RunConfig
from mmjax.schedule.phase_specs import BUDGET, PhaseSpec, budget_weights, phase_spec_at
from mmjax.schedule.step_times import measured, pace

_SAME = 20  # shares are kept where none would change by more than a 20th of itself


class Budget:
    """Sets new shares of steps at the boundaries that `schedule.rebalance_every` makes."""

    def __init__(self, experiment: Experiment, workdir: epath.Path) -> None:
        self._experiment, self._path = experiment, workdir / SEGMENTS
        self._planned = experiment.planned.phase_specs()

    def next(self, step: int) -> int | None:
        """Return the first boundary after `step`, None if there is none to come."""
        every, stop = self._experiment.run.schedule.rebalance_every, self._experiment.run.steps
        if not every:
            return None
        boundaries = range((step // every + 1) * every, stop, every)
        return next((b for b in boundaries if self._phase_spec(b).rule == BUDGET), None)

    def is_boundary(self, step: int) -> bool:
        """Return whether shares are recomputed at `step`."""
        return step > 0 and self.next(step - 1) == step

    def settle(self, clock: Clock) -> Clock:
        """Return the clock of a boundary, with a new segment from here on if the shares are to change.

        The lines of all steps before must be in `metrics.jsonl`. Called by all processes.
        """
        planned = self._phase_spec(clock.step).weights
        targets = {t: 0 if t in clock.quarantined else weight for t, weight in planned.items()}
        active = [task for task, weight in targets.items() if weight]
        if not active:
            return clock  # in this phase the one before it continues, see `health.quarantine`
        shares = np.zeros(len(active), np.int32)
        if jax.process_index() == 0:
            decided = self._decision(clock.step, targets)
            shares = np.array([decided[task] for task in active], np.int32)
        shares = multihost_utils.broadcast_one_to_all(shares)
        weights = {**dict.fromkeys(targets, 0), **dict(zip(active, shares.tolist(), strict=True))}
        if _is_near(clock.schedule.segment(clock.step).weights, weights):
            return clock
        # Later phases stay. A quarantine that was to begin after this step has begun with it.
        starts = {spec.start for spec in self._planned}
        schedule = clock.schedule.replace(
            clock.step, weights, rule="shares", now=clock.step, keep=starts
        )
        return replace(clock, schedule=schedule)

    def _phase_spec(self, step: int) -> PhaseSpec:
        return phase_spec_at(self._planned, step)

    def _decision(self, step: int, shares: Mapping[str, int]) -> dict[str, int]:
        """Return the decision written for this step and config; else measure and write it."""
        key = _fingerprint(self._experiment.block)
        for line in _read(self._path):
            if (line["start"], line["config"], line["wanted"]) == (step, key, dict(shares)):
                return dict(line["weights"])
        seconds = self._seconds(step)
        weights = budget_weights(seconds, shares)
        record = {
            "start": step, "config": key, "wanted": dict(shares), "weights": weights, "seconds": seconds,
        }  # fmt: skip
        file = LineFile(self._path)
        try:
            file.append(json.dumps(record) + "\n")
        finally:
            file.close()
        return weights

    def _seconds(self, step: int) -> dict[str, float]:
        """Return the seconds per step of each task, for its shapes at `step`, from the metrics so far."""
        phases = self._experiment.phases
        lines = (
            {**line, "task": phases.program(line)}
            for line in metrics.read(self._path.parent)
            if line.get("kind") == "train" and line["step"] < step
        )
        variants = phases.at(step).variants
        flops = {
            v.program: self._experiment.flops[v.program]
            for shapes in variants.values()
            for v in shapes
        }
        known = {program: s for program, s in measured(lines).items() if program in flops}
        programs = pace(flops, known, 1.0).seconds
        return {task: shapes.mean(programs) for task, shapes in variants.items()}


def _fingerprint(block: configs.Block) -> str:
    """Return a digest of the keys that fix a run's steps."""
    classes = ((k, v, configs.key_class(k, RunConfig, block)) for k, v in configs.flat(block))
    leaves = {k: v for k, v, kind in classes if kind != "free"}
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def _is_near(now: Mapping[str, int], then: Mapping[str, int]) -> bool:
    """Return whether two lists of shares are the same to a 20th of each."""
    if now.keys() != then.keys():
        return False
    sums = sum(now.values()), sum(then.values())
    pairs = [(now[task] * sums[1], then[task] * sums[0]) for task in now]
    return all(_SAME * abs(b - a) <= a for a, b in pairs)


def _read(path: epath.Path) -> list[dict[str, Any]]:
    """Return the decisions that are written; no step has run under one that a kill tore, or that is none."""
    keys = {"start", "config", "wanted", "weights"}
    return [line for line in read_records(path) if keys <= line.keys() and _is_decision(line)]


def _is_decision(line: Mapping[str, Any]) -> bool:
    """Return whether each of the wanted tasks has a weight."""
    shares, weights = line["wanted"], line["weights"]
    if not isinstance(shares, dict) or not isinstance(weights, dict):
        return False
    whole = all(isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in weights.values())
    return whole and {t for t, w in shares.items() if w} <= weights.keys() and any(weights.values())
