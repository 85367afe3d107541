"""The optimizer of a run: one state, seen by each task and each phase in its own way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from mmjax.core.errors import UserError
from mmjax.engine.steps import ModelSpec, reach_of
from mmjax.engine.teachers import TICK, moving
from mmjax.optim.config import OptimizerConfig
from mmjax.optim.optimizer import PARTS, Optimizer
from mmjax.optim.reach import Reach
from mmjax.optim.rules import apply_rules, trained
from mmjax.optim.views import SHARED, UpdateScope, check_kind, make_update_scope, shared_parameters
from mmjax.schedule.phases import Phase, Phases
from mmjax.schedule.planned import PlannedSchedule
from mmjax.schedule.schedule import Schedule
from mmjax.task import Task


@dataclass(frozen=True)
class Optimizers:
    """The optimizer under each phase of a run, over one state.

    Attributes:
      config: `optimizer` of the config.
      spec: the model whose parameters it moves.
      tasks: by name.
      phases: what holds from which step on.
      planned: the run's schedule, which lengths come from.
    """

    config: OptimizerConfig
    spec: ModelSpec
    tasks: Mapping[str, Task]
    phases: Phases
    planned: PlannedSchedule

    @property
    def whole(self) -> Optimizer:
        """The whole run's optimizer: it holds state for every parameter that any phase trains."""
        declaration = self.spec.declaration
        return Optimizer(
            self.config, declaration.specs, self._length, self.views, buffers=declaration.buffers
        )

    def of(self, phase: Phase) -> Optimizer:
        """Return the optimizer as it is under a phase, over the same state."""
        config = replace(self.config, rules=phase.rules)
        views, common = self._views(phase), shared_parameters(self.views)
        declaration = self.spec.declaration
        return Optimizer(
            config, declaration.specs, self._length, views, common, declaration.buffers
        )

    @cached_property
    def views(self) -> Mapping[str, UpdateScope]:
        """The view that each task has of the optimizer, all phases taken together."""
        per_phase = [self._views(phase) for phase in self.phases.entries]
        return {
            name: UpdateScope(
                view.kind, frozenset[str]().union(*(views[name].trains for views in per_phase))
            )
            for name, view in per_phase[0].items()
        }

    def _views(self, phase: Phase) -> dict[str, UpdateScope]:
        declaration = self.spec.declaration
        moving = trained(phase.rules, declaration.specs, declaration.buffers)
        return {
            name: make_update_scope(kind, moving, None if kind == SHARED else self._reaches[name])
            for name, kind in self._kinds().items()
        }

    @cached_property
    def _reaches(self) -> Mapping[str, Reach]:
        """The parameters that a loss reaches, traced, of each task that does not share all."""
        kinds = self._kinds()
        return {
            n: reach_of(self.spec, task) for n, task in self.tasks.items() if kinds[n] != SHARED
        }

    def _kinds(self) -> dict[str, str]:
        default = self.config.update_scope
        return {
            name: check_kind(task.config.update_scope, f"tasks.{name}.update_scope")
            if task.config.update_scope
            else check_kind(default, "optimizer.update_scope")
            for name, task in self.tasks.items()
        }

    def check(self) -> None:
        """Raise a `UserError` where a task's view or a rule cannot be."""
        every, kinds = self.config.accumulate, self._kinds()
        unshared = [task for task, kind in kinds.items() if kind != SHARED]
        if every > 1 and unshared:
            raise UserError(
                f"optimizer.accumulate is {every}, which makes one update of several tasks' steps; task "
                f"'{unshared[0]}' has the update_scope '{kinds[unshared[0]]}'. "
                f"Set it to '{SHARED}', or accumulate to 1."
            )
        averages = [name for task in self.tasks for name in moving(self.spec.teachers, task)]
        if every > 1 and averages:
            raise UserError(
                f"optimizer.accumulate is {every}, and the teacher '{averages[0]}' moves with each step of a task. Set "
                f"accumulate to 1 (microbatches save memory too), or model.teachers.{averages[0]}.kind to 'frozen'."
            )
        for phase in self.phases.entries:
            declaration = self.spec.declaration
            apply_rules(phase.rules, {**declaration.specs, **declaration.buffers})
        self._check_trained()

    def _check_trained(self) -> None:
        """Raise if all parameters that a task's loss reaches are frozen in every phase."""
        specs = self.spec.declaration.specs
        for name, view in self.views.items():
            if view.kind == SHARED and view.trains == specs.keys():
                continue  # nothing is frozen: nothing is traced
            if not self.tasks[name].config.weight:
                continue  # it does not run
            trained = view.trains
            if view.kind == SHARED and trained:
                trained = trained & reach_of(self.spec, self.tasks[name]).names
            if not trained:
                raise UserError(
                    f"tasks.{name}: every parameter that its loss reaches is frozen, so that it trains nothing. Change "
                    "optimizer.rules (a rule with freeze = False trains what it matches), or remove the task."
                )

    def _length(self, task: str) -> int:
        """Return the run's length for a task in `optimizer.unit`: as its schedule has it from step 0."""
        if self.config.unit == "steps":
            return self.planned.steps
        if self.config.unit == "examples":
            return self.planned.examples
        return self.planned.visits.get(task, 0)

    def progress(
        self, task: str, step: int, positions: Mapping[str, int], schedule: Schedule | None = None
    ) -> dict[str, float]:
        """Return what a task's update asks of the clock apart from step and visit, as ticks of a program.

        Args:
          schedule: the run's, by whose visits teachers move; as planned if None.
        """
        ticks = {**self.extents[task], "scale": self.phases.at(step).scale}
        if self.config.accumulate > 1:
            ticks["last"] = int(step + 1 == self.planned.steps)
        if self.config.unit == "examples":
            ticks["part"] = min(sum(positions.values()) * PARTS // self.planned.examples, PARTS)
        for name, teacher in moving(self.spec.teachers, task).items():
            visits = self.planned.schedule() if schedule is None else schedule
            ticks[TICK + name] = teacher.decay(step, self.planned.steps, visits)
        return ticks

    @cached_property
    def extents(self) -> Mapping[str, Mapping[str, float]]:
        """Lengths that each task's learning rate depends on; this may trace, which the loop must not."""
        optimizer = self.whole
        return {task: optimizer.extent(task) for task in self.tasks}
