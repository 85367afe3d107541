"""Step times of the tasks: measured in the lines of a run, else from model FLOPs."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.core.chips import peak_flops

# Assumptions on a machine that has not run the tasks; wherever they are used, that is logged.
CORE_FLOPS = 10e9  # FLOP/s of one core of a CPU
UTILISATION = 0.4  # of a chip's published peak

_LATEST = 51  # visits of a task whose median counts


@dataclass(frozen=True)
class Pace:
    """Seconds of a step of each task.

    Attributes:
      seconds: by task.
      measured: the tasks whose seconds were measured; the others' are from model FLOPs.
      rate: FLOP/s at which the others are taken to run.
    """

    seconds: dict[str, float]
    measured: tuple[str, ...]
    rate: float


def measured(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds that the devices need for a step of each task: the median of its latest visits.

    A step whose end the host met late, because it waited for data, counts only where a task has no
    other.

    Args:
      lines: of `metrics.jsonl`, in order.
    """
    exact: dict[str, list[float]] = defaultdict(list)
    rough: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line.get("kind") != "train" or "seconds" not in line.get("timing", {}):
            continue
        timing = line["timing"]
        if "busy" in timing:
            exact[line["task"]].append(timing["busy"])
        rough[line["task"]].append(timing["seconds"])
    return {t: statistics.median((exact.get(t) or s)[-_LATEST:]) for t, s in rough.items()}


def pace(flops: Mapping[str, float], known: Mapping[str, float], rate: float) -> Pace:
    """Return the seconds of every task in `flops`.

    Args:
      flops: model FLOPs of a step, per task.
      known: measured seconds; tasks without are taken to run at the FLOP/s of those that are here.
      rate: FLOP/s to assume where nothing is measured.
    """
    rates = [flops[task] / s for task, s in known.items() if flops.get(task) and s > 0]
    rate = statistics.median(rates) if rates else rate
    seconds = {task: known.get(task) or count / rate for task, count in flops.items()}
    return Pace(seconds, tuple(t for t in flops if known.get(t)), rate)


def assumed_rate(kind: str, devices: int) -> float:
    """Return the FLOP/s to assume of `devices` devices of a kind: a share of the published peak, or of CPU cores."""
    peak = peak_flops(kind)
    return CORE_FLOPS * (os.cpu_count() or 1) if peak is None else UTILISATION * peak * devices
