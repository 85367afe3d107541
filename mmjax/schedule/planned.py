"""The schedule of a run as its config plans it, and what follows from it for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mmjax.core.errors import UserError, nearest
from mmjax.schedule.config import ScheduleConfig
from mmjax.schedule.phase_specs import BUDGET, PhaseSpec, from_config, key_of, phase_specs
from mmjax.schedule.phases import Phases
from mmjax.schedule.schedule import Schedule
from mmjax.task import Task


@dataclass(frozen=True)
class PlannedSchedule:
    """A run's schedule, in integers.

    Attributes:
      config: `schedule` of the config.
      tasks: by name, in the order in which they take turns.
      phases: what holds from which step on.
      seed: for the rule `random`.
      steps: the run's length.
      flops: returns the model FLOPs of each training program, for the rule `budget`.
    """

    config: ScheduleConfig
    tasks: Mapping[str, Task]
    phases: Phases
    seed: int
    steps: int
    flops: Callable[[], Mapping[str, int]]

    def phase_specs(self) -> list[PhaseSpec]:
        """Return the phases as the config describes them."""
        weights, intervals = self._numbers("weight"), self._numbers("interval")
        return phase_specs(self.config.rule, weights, self.config.phases, intervals)

    def schedule(self, seconds: Callable[[int], Mapping[str, float]] | None = None) -> Schedule:
        """Return the schedule from step 0 on.

        Args:
          seconds: step -> seconds of a step of each task then, for phases under `budget`; model FLOPs if None.
        """
        weights, intervals = self._numbers("weight"), self._numbers("interval")
        rule, phases = self.config.rule, self.config.phases
        return from_config(rule, weights, self.seed, phases, seconds or self.flops_at, intervals)

    def flops_at(self, step: int) -> dict[str, float]:
        """Return the model FLOPs of a training step of each task, as it is at a step; the mean over its shapes."""
        return {t: v.mean(self.flops()) for t, v in self.phases.at(step).variants.items()}

    @cached_property
    def visits(self) -> Mapping[str, int]:
        """Visits of each task in the whole run."""
        return self.schedule().visits(self.steps)

    @cached_property
    def examples(self) -> int:
        """Examples that all tasks read in the whole run."""
        schedule = self.schedule()
        return sum(self.phases.consumed(schedule, name, 0, self.steps) for name in self.tasks)

    def check(self) -> None:
        """Raise a `UserError` where the schedule cannot be: names, numbers, rules, phases."""
        for index, phase in enumerate(self.config.phases):
            where = f"schedule.phases[{index}]"
            self._check_names(phase.weights or {}, f"{where}.weights")
            self._check_names(phase.intervals or {}, f"{where}.intervals")
        self._check_numbers()
        self.schedule(lambda start: dict.fromkeys(self.tasks, 1.0))
        every = self.config.rebalance_every
        if every and all(spec.rule != BUDGET for spec in self.phase_specs()):
            raise UserError(
                f"config.schedule.rebalance_every is {every}, but no phase has the rule '{BUDGET}'. "
                "Set schedule.rule, or leave rebalance_every at 0."
            )

    def _check_names(self, weights: Mapping[str, int], where: str) -> None:
        for name in weights:
            if name not in self.tasks:
                hint = nearest(name, self.tasks)
                raise UserError(f"Config key '{where}': no task '{name}'.{hint}")

    def _check_numbers(self) -> None:
        """Raise where a weight or an interval is set that no rule of the run reads."""
        read = {key_of(spec.rule) for spec in self.phase_specs()}
        for key, other in (("weight", "interval"), ("interval", "weight")):
            named = [n for n, number in self._numbers(key).items() if number != 1]
            in_phases = any(getattr(phase, f"{key}s") for phase in self.config.phases)
            if key not in read and (named or in_phases):
                where = f"tasks.{named[0]}.{key}" if named else f"{key}s of schedule.phases"
                raise UserError(
                    f"{where} is set, but the schedule's rule '{self.config.rule}' reads {other}s. "
                    f"Set {other}, or another schedule.rule."
                )

    def _numbers(self, key: str) -> dict[str, int]:
        """Return `weight` or `interval` of each task."""
        return {name: getattr(task.config, key) for name, task in self.tasks.items()}
