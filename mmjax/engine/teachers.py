"""Teachers of a run: which parameters each copies, when it moves, and how.

The state holds one as `teacher/NAME/PARAMETER`, float32 or wider, under canonical names and sharded as its parameter.
An objective reads it as `model.teacher(NAME)`; within a step it is constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import Arrays, Spec
from mmjax.core.teachers import TEACHER, TeacherConfig
from mmjax.optim.rules import matches
from mmjax.schedule.schedule import Schedule
from mmjax.task import Task

TICK = "decay:"  # begins the name of a teacher's decay among the ticks of a step


@dataclass(frozen=True)
class Teacher:
    """A teacher of a run.

    Attributes:
      config: its block.
      parameters: what it copies, by name.
      tasks: those that read it, whose updates move it.
    """

    config: TeacherConfig
    parameters: frozenset[str]
    tasks: tuple[str, ...]

    def decay(self, step: int, steps: int, schedule: Schedule) -> float:
        """Return the decay of the update of `step`, by the updates of its tasks up to there and in the whole run."""
        done, whole = schedule.visits(step), schedule.visits(steps)
        update, updates = (sum(visits.get(t, 0) for t in self.tasks) for visits in (done, whole))
        return self.config.decay_at(update, updates)


def make_teachers(
    configs: Mapping[str, TeacherConfig], specs: Mapping[str, Spec], tasks: Mapping[str, Task]
) -> dict[str, Teacher]:
    """Return the teachers of a config, checked.

    Raises:
      UserError: one that copies nothing, or a part of a group of layers; one that no task reads, or a task that reads
        one that is not there.
    """
    readers: dict[str, list[str]] = {name: [] for name in configs}
    for task in tasks.values():
        for name in task.objective.teachers():
            if name not in readers:
                known = ", ".join(configs) or "none"
                raise UserError(
                    f"tasks.{task.name}.objective reads the teacher '{name}'; model.teachers has {known}."
                    f"{nearest(name, configs)} Add model.teachers.{name}, such as {{'of': ['stems/.*', 'trunk/.*']}}."
                )
            readers[name].append(task.name)
    for name, names in readers.items():
        if not names:
            raise UserError(
                f"model.teachers.{name}: the objective of no task reads it. Remove it, or name it in an objective."
            )
    return {
        name: Teacher(
            config, _part(config, specs, f"model.teachers.{name}.of"), tuple(readers[name])
        )
        for name, config in configs.items()
    }


def _part(config: TeacherConfig, specs: Mapping[str, Spec], where: str) -> frozenset[str]:
    """Return the names of the parameters that a teacher copies."""
    if not config.of:
        raise UserError(
            f"{where} is empty: a teacher of nothing. Give patterns, such as ['trunk/.*']."
        )
    names = [c for spec in specs.values() for c in spec.canonical]
    matched = (matches(pattern, names, f"{where}[{i}]") for i, pattern in enumerate(config.of))
    chosen = frozenset[str]().union(*matched)
    for spec in specs.values():
        part = [c for c in spec.canonical if c in chosen]
        if part and len(part) < len(spec.canonical):
            raise UserError(
                f"{where} matches {', '.join(part)}, but not the other layers of their group. "
                "Make two groups of it in model.layers; layers keep their names."
            )
    return frozenset(n for n, spec in specs.items() if spec.canonical[0] in chosen)


def moving(teachers: Mapping[str, Teacher], task: str) -> dict[str, Teacher]:
    """Return the averages that the updates of a task move."""
    return {n: t for n, t in teachers.items() if t.config.moves and task in t.tasks}


def followed(
    buffers: Arrays,
    parameters: Arrays,
    teachers: Mapping[str, Teacher],
    ticks: Mapping[str, object],
) -> Arrays:
    """Return the averages after an update that led to `parameters`, by `teacher/NAME/PARAMETER`.

    Every parameter of the part counts, whether the loss reached it or not.
    """
    after = {}
    for name, teacher in teachers.items():
        for parameter in sorted(teacher.parameters):
            full = f"{TEACHER}{name}/{parameter}"
            old = buffers[full]
            decay = jnp.asarray(ticks[TICK + name], old.dtype)
            after[full] = decay * old + (1 - decay) * parameters[parameter].astype(old.dtype)
    return after
