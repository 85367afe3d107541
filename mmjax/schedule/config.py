"""The block of a config that describes the schedule, and its phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmjax.core.bounds import AMOUNT, COUNT, SIZE, check
from mmjax.optim.rules import RuleConfig


@dataclass(frozen=True)
class PhaseTaskConfig:
    """Changes that a phase makes to a task; everything else stays as it was.

    Attributes:
      inputs: settings by modality that replace those of `tasks.NAME.inputs` (resolution, length).
      batch: examples per visit, over all devices.
      microbatches: parts in which a batch is computed.
      shapes: settings by shape that replace those of `tasks.NAME.shapes`.
    """

    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch: int | None = None
    microbatches: int | None = None
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, batch=COUNT, microbatches=COUNT)

    @property
    def block(self) -> Mapping[str, Any]:
        """The keys that the phase changes, as plain data."""
        return {key: value for key, value in vars(self).items() if value not in (None, {})}


@dataclass(frozen=True)
class PhaseConfig:
    """One of `schedule.phases`: a first step and what changes there; the rest stays as it was before.

    Attributes:
      start: its first step.
      weights: task name -> weight, for the tasks that run from then on.
      intervals: task name -> interval, likewise, under the rule `interval`.
      rule: the rule of the schedule.
      tasks: task name -> what changes of it: other resolutions, lengths, batches.
      rules: rules of the optimizer after `optimizer.rules` (to freeze parts, for example); they replace those of the
        phase before.
      learning_rate: factor of the learning rate.
    """

    start: int
    weights: dict[str, int] | None = None
    intervals: dict[str, int] | None = None
    rule: str | None = None
    tasks: dict[str, PhaseTaskConfig] = field(default_factory=dict)
    rules: tuple[RuleConfig, ...] | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        check(self, start=COUNT, weights=SIZE, intervals=SIZE, learning_rate=AMOUNT)


@dataclass(frozen=True)
class ScheduleConfig:
    """The schedule of tasks.

    Attributes:
      rule: `shares`, `random`, `interval` or `budget`; see `mmjax/schedule/rules/`. Under `budget` a
        task's `weight` is its part of the chips' time, first by model FLOPs.
      phases: later parts of the run, by ascending `start`, and what changes there. Evaluation has the shapes of
        `tasks` at step 0.
      rebalance_every: under `budget`, steps after which, and again after as many, the shares are set from
        measured step times; 0 to stay with model FLOPs.
    """

    rule: str = "shares"
    phases: tuple[PhaseConfig, ...] = ()
    rebalance_every: int = 0

    def __post_init__(self) -> None:
        check(self, rebalance_every=SIZE)
