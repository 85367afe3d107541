"""Phases of a run: what the phases of a schedule change beside weights and rule.

A phase may give tasks other shapes (resolution, context length, batch), freeze parameters or move them at another
rate. A task in another shape is another program; two phases in which it is the same share theirs. Everything here is
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
from mmjax.schedule.config import PhaseConfig
from mmjax.schedule.schedule import Schedule
from mmjax.schedule.shapes import ShapeVariant, ShapeVariants, merged
from mmjax.task import Task, make_task


@dataclass(frozen=True)
class Phase:
    """The settings that hold from a step on.

    Attributes:
      start: that step.
      tasks: by name, with the shapes that they have then outside of `shapes`.
      variants: by task, what its visits run. A program has the task's name, with `.SHAPE` where there are
        several and `@START` where they are not its first.
      rules: of the optimizer, by parameter path, those of the phase last.
      scale: factor of the learning rate.
    """

    start: int
    tasks: Mapping[str, Task]
    variants: Mapping[str, ShapeVariants]
    rules: tuple[RuleConfig, ...] = ()
    scale: float = 1.0


@dataclass(frozen=True)
class Phases:
    """The phases of a run, by ascending start, the first at step 0."""

    entries: tuple[Phase, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [phase.start for phase in self.entries]

    def index(self, step: int) -> int:
        """Return which of `entries` holds at a step."""
        return bisect.bisect_right(self._starts, step) - 1

    def at(self, step: int) -> Phase:
        return self.entries[self.index(step)]

    def variant(self, task: str, step: int, visit: int) -> ShapeVariant:
        """Return the variant that a task's visit runs at a step."""
        return self.at(step).variants[task].at(visit)

    def program(self, line: Mapping[str, Any]) -> str:
        """Return the program that made a line of `metrics.jsonl`; the task's name if the config lacks it."""
        task, step = str(line["task"]), line["step"]
        if task not in self.at(step).variants:
            return task
        return self.variant(task, step, line["visit"]).program

    @property
    def programs(self) -> dict[str, tuple[Task, Phase]]:
        """The training programs: name -> task, in its shapes, and a phase that it is for."""
        programs: dict[str, tuple[Task, Phase]] = {}
        for phase in self.entries:
            for variants in phase.variants.values():
                for variant in variants:
                    programs.setdefault(variant.program, (variant.task, phase))
        return programs

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Phase]]:
        """Yield the pieces of steps [start, stop), cut where phases change."""
        while start < stop:
            index = self.index(start)
            end = min([stop, *self._starts[index + 1 : index + 2]])
            yield start, end, self.entries[index]
            start = end

    def consumed(self, schedule: Schedule, task: str, start: int, stop: int) -> int:
        """Return how many examples a task reads in steps [start, stop)."""
        return sum(
            schedule.between(a, b).get(task, 0) * phase.tasks[task].batch
            for a, b, phase in self.pieces(start, stop)
        )

    def visits(self, schedule: Schedule, start: int, stop: int) -> dict[str, int]:
        """Return how often each program runs in steps [start, stop); those that do not are missing."""
        counts: Counter[str] = Counter()
        for a, b, phase in self.pieces(start, stop):
            before, after = schedule.visits(a), schedule.visits(b)
            for task, variants in phase.variants.items():
                counts.update(variants.counts(before.get(task, 0), after.get(task, 0)))
        return {program: count for program, count in counts.items() if count}


def make_phases(
    tasks: Mapping[str, Task],
    phases: Sequence[PhaseConfig],
    rules: Sequence[RuleConfig],
    modalities: Mapping[str, Modality],
) -> Phases:
    """Return the phases of a config whose `phase_specs` are sound.

    Args:
      tasks: as they are at step 0.
      phases: `schedule.phases`.
      rules: of the optimizer at step 0.

    Raises:
      UserError: an unknown task; a task with other keys or values than it may have.
    """
    names: dict[str, str] = {}
    first = {n: _variants(t, modalities, (), "", names) for n, t in tasks.items()}
    result = [Phase(0, dict(tasks), first, tuple(rules))]
    phase_rules: tuple[RuleConfig, ...] = ()
    for index, phase in enumerate(phases):
        where, before = f"schedule.phases[{index}]", result[-1]
        phase_rules = phase_rules if phase.rules is None else phase.rules
        now = dict(before.tasks)
        for task, changes in phase.tasks.items():
            if task not in tasks:
                raise UserError(
                    f"Config key '{where}.tasks': no task '{task}'.{nearest(task, tasks)}"
                )
            block = merged(_block(now[task]), changes.block)
            now[task] = make_task(task, block, modalities, f"{where}.tasks.{task}")
        variants = {
            task: _variants(changed, modalities, phase_rules, f"@{phase.start}", names)
            for task, changed in now.items()
        }
        scale = before.scale if phase.learning_rate is None else phase.learning_rate
        result.append(Phase(phase.start, now, variants, (*rules, *phase_rules), scale))
    return Phases(tuple(result))


def _variants(
    task: Task,
    modalities: Mapping[str, Modality],
    rules: Sequence[RuleConfig],
    suffix: str,
    names: dict[str, str],
) -> ShapeVariants:
    """Return a task's, under names that `names` keeps by what distinguishes programs."""
    if not task.config.shapes:
        name = names.setdefault(_key(task, rules), f"{task.name}{suffix}")
        return ShapeVariants((ShapeVariant(name, task),))
    variants = []
    for shape, config in task.config.shapes.items():
        block = merged({**_block(task), "shapes": {}}, {"inputs": config.inputs})
        variant_task = make_task(task.name, block, modalities, f"tasks.{task.name}.shapes.{shape}")
        name = names.setdefault(_key(variant_task, rules), f"{task.name}.{shape}{suffix}")
        variants.append(ShapeVariant(name, variant_task, shape, config.weight))
    return ShapeVariants(tuple(variants))


def _key(task: Task, rules: Sequence[RuleConfig]) -> str:
    """Return what distinguishes a task's programs."""
    key = [task.name, _block(task), [vars(rule) for rule in rules]]
    return json.dumps(key, sort_keys=True)


def _block(task: Task) -> dict[str, Any]:
    block: dict[str, Any] = configs.plain(asdict(task.config), task.name)
    return block
