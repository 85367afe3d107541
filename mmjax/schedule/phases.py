"""What holds from which step on: what the phases of a schedule change besides weights and rule.

A phase may give tasks other shapes (resolution, context length, batch), freeze parameters or move them at another
rate. A task under other settings is another program; two phases with the same settings share theirs. Everything here is
a function of the step, so that a run that was interrupted finds the same.
"""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mmjax.core import config as configs
from mmjax.core.errors import UserError, nearest
from mmjax.modalities.base import Modality
from mmjax.optim.rules import RuleConfig
from mmjax.schedule.buckets import Variant, Variants, merged
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.schedule import Schedule
from mmjax.task import Task, make_task


@dataclass(frozen=True)
class Setting:
    """What holds from a step on.

    Attributes:
      start: that step.
      tasks: by name, with the shapes that they have then outside of buckets.
      variants: by task, what its visits run. A program has the task's name, with `.BUCKET` where there are
        several and `@START` where they are not its first.
      rules: of the optimizer, by parameter path, those of the phase last.
      scale: factor of the learning rate.
    """

    start: int
    tasks: Mapping[str, Task]
    variants: Mapping[str, Variants]
    rules: tuple[RuleConfig, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Those of a whole run, by ascending start, the first at step 0."""

    each: tuple[Setting, ...]

    @classmethod
    def steady(cls, tasks: Mapping[str, Task]) -> Settings:
        """Tasks that stay as they are."""
        return cls((Setting(0, tasks, {n: Variants((Variant(n, t),)) for n, t in tasks.items()}),))

    @cached_property
    def _starts(self) -> list[int]:
        return [setting.start for setting in self.each]

    def index(self, step: int) -> int:
        """Which of `each` holds at a step."""
        return bisect.bisect_right(self._starts, step) - 1

    def at(self, step: int) -> Setting:
        return self.each[self.index(step)]

    def variant(self, task: str, step: int, visit: int) -> Variant:
        """What a task's visit runs at a step."""
        return self.at(step).variants[task].at(visit)

    def program(self, line: Mapping[str, Any]) -> str:
        """Name of the program that made a line of `metrics.jsonl`; the task's for one that the config lacks."""
        task, step = str(line["task"]), line["step"]
        if task not in self.at(step).variants:
            return task
        return self.variant(task, step, line["visit"]).program

    @property
    def programs(self) -> dict[str, tuple[Task, Setting]]:
        """The training programs: name -> task, in its shapes, and a setting that it is for."""
        found: dict[str, tuple[Task, Setting]] = {}
        for setting in self.each:
            for variants in setting.variants.values():
                for variant in variants:
                    found.setdefault(variant.program, (variant.task, setting))
        return found

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Setting]]:
        """Steps [start, stop), cut where the settings change."""
        while start < stop:
            index = self.index(start)
            end = min([stop, *self._starts[index + 1 : index + 2]])
            yield start, end, self.each[index]
            start = end

    def consumed(self, schedule: Schedule, task: str, start: int, stop: int) -> int:
        """Examples that a task reads in steps [start, stop)."""
        return sum(
            schedule.between(a, b).get(task, 0) * setting.tasks[task].batch
            for a, b, setting in self.pieces(start, stop)
        )

    def visits(self, schedule: Schedule, start: int, stop: int) -> dict[str, int]:
        """How often each program runs in steps [start, stop); those that do not are missing."""
        found: Counter[str] = Counter()
        for a, b, setting in self.pieces(start, stop):
            before, after = schedule.visits(a), schedule.visits(b)
            for task, variants in setting.variants.items():
                found.update(variants.counts(before.get(task, 0), after.get(task, 0)))
        return {program: count for program, count in found.items() if count}


def make_settings(
    tasks: Mapping[str, Task],
    phases: Sequence[PhaseConfig],
    rules: Sequence[RuleConfig],
    modalities: Mapping[str, Modality],
) -> Settings:
    """The settings of a config whose stretches are sound (see `schedule.stretches`).

    Args:
      tasks: as they are at step 0.
      phases: `schedule.phases`.
      rules: of the optimizer at step 0.

    Raises:
      UserError: an unknown task; a task with other keys or values than it may have.
    """
    names: dict[str, str] = {}
    first = {n: _variants(t, modalities, (), "", names) for n, t in tasks.items()}
    each = [Setting(0, dict(tasks), first, tuple(rules))]
    own: tuple[RuleConfig, ...] = ()
    for index, phase in enumerate(phases):
        where, before = f"schedule.phases[{index}]", each[-1]
        own = own if phase.rules is None else phase.rules
        now = dict(before.tasks)
        for task, changes in phase.tasks.items():
            if task not in tasks:
                raise UserError(
                    f"Config key '{where}.tasks': no task '{task}'.{nearest(task, tasks)}"
                )
            whole = merged(_block(now[task]), changes.block)
            now[task] = make_task(task, whole, modalities, f"{where}.tasks.{task}")
        variants = {
            task: _variants(made, modalities, own, f"@{phase.start}", names)
            for task, made in now.items()
        }
        scale = before.scale if phase.learning_rate is None else phase.learning_rate
        each.append(Setting(phase.start, now, variants, (*rules, *own), scale))
    return Settings(tuple(each))


def _variants(
    task: Task,
    modalities: Mapping[str, Modality],
    rules: Sequence[RuleConfig],
    suffix: str,
    names: dict[str, str],
) -> Variants:
    """A task's, under names that `names` keeps by what distinguishes programs."""
    if not task.config.shapes:
        name = names.setdefault(_key(task, rules), f"{task.name}{suffix}")
        return Variants((Variant(name, task),))
    each = []
    for bucket, config in task.config.shapes.items():
        block = merged({**_block(task), "shapes": {}}, {"inputs": config.inputs})
        made = make_task(task.name, block, modalities, f"tasks.{task.name}.shapes.{bucket}")
        name = names.setdefault(_key(made, rules), f"{task.name}.{bucket}{suffix}")
        each.append(Variant(name, made, bucket, config.weight))
    return Variants(tuple(each))


def _key(task: Task, rules: Sequence[RuleConfig]) -> str:
    """What distinguishes a task's programs."""
    said = [task.name, _block(task), [vars(rule) for rule in rules]]
    return json.dumps(said, sort_keys=True)


def _block(task: Task) -> dict[str, Any]:
    block: dict[str, Any] = configs.plain(asdict(task.config), task.name)
    return block
