"""An experiment: a checked config, and what it names, built. Shared by every main."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.optimizers import Optimizers
from mmjax.engine.requests import pass_key, train_requests
from mmjax.engine.state import State, abstract_state, compute_dtype
from mmjax.engine.steps import ModelSpec, positions
from mmjax.engine.teachers import Teacher, make_teachers
from mmjax.evaluators.base import Evaluator, Pass, make_evaluators
from mmjax.modalities.base import Modality
from mmjax.model import declare_model
from mmjax.run_config import RunConfig
from mmjax.schedule.phases import Phases, make_phases
from mmjax.schedule.planned import PlannedSchedule
from mmjax.schedule.shapes import check_tokens
from mmjax.task import Task, make_task


@dataclass(frozen=True)
class Experiment:
    """The objects that a config names; building them opens and compiles nothing.

    Attributes:
      block: the config as plain data.
      run: the config, checked.
      modalities, tasks, evaluators: by name; evaluators by task and name.
      declaration: the model's parameters, declared.
      extensions: SHA-256 of the files outside mmjax that the config names, by `KIND/NAME`.
      teachers: by name.
    """

    block: dict[str, Any]
    run: RunConfig
    modalities: Mapping[str, Modality]
    tasks: Mapping[str, Task]
    evaluators: Mapping[str, Mapping[str, Evaluator]]
    declaration: Declaration
    extensions: Mapping[str, str] = field(default_factory=dict)
    teachers: Mapping[str, Teacher] = field(default_factory=dict)

    @cached_property
    def phases(self) -> Phases:
        """The phases of the run, each with the settings that hold from its first step on."""
        rules, phases = self.run.optimizer.rules, self.run.schedule.phases
        return make_phases(self.tasks, phases, rules, self.modalities)

    @property
    def used(self) -> dict[str, Modality]:
        """The modalities that tasks read, by name: those whose files a run needs."""
        names = {name for task in self.tasks.values() for name in task.inputs}
        return {name: m for name, m in self.modalities.items() if name in names}

    @cached_property
    def spec(self) -> ModelSpec:
        """The model, and how it computes."""
        dtype = self.run.dtype
        return ModelSpec(
            self.declaration,
            compute_dtype(dtype.parameters),
            compute_dtype(dtype.compute),
            self.run.seed,
            self.teachers,
        )

    @cached_property
    def planned(self) -> PlannedSchedule:
        """The schedule as the config describes it."""
        run = self.run
        return PlannedSchedule(
            run.schedule, self.tasks, self.phases, run.seed, run.steps, lambda: self.flops
        )

    @cached_property
    def optimizers(self) -> Optimizers:
        """The optimizer under each phase."""
        return Optimizers(self.run.optimizer, self.spec, self.tasks, self.phases, self.planned)

    @property
    def evaluation_batch(self) -> int:
        """Examples of an evaluation step."""
        return self.run.evaluation.batch

    def check(self) -> None:
        """Raise what is wrong with the config as a whole: now, and not when the run begins."""
        self.planned.check()
        self.optimizers.check()
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Check that phases and shapes change no parameter's shape, and that shapes keep the number of tokens."""
        for task, _ in self.phases.programs.values():
            if task is self.tasks[task.name]:
                continue
            heads = [(t.objective.head, self._heads(t)) for t in (self.tasks[task.name], task)]
            declare_model(self.run.model, self.modalities, heads)
        for phase in self.phases.entries:
            for name, variants in phase.variants.items():
                sizes = {
                    v.shape: Fraction(
                        positions(v.task, self.declaration, v.task.rows().batch(v.task.batch)),
                        v.task.batch,
                    )
                    for v in variants
                    if v.shape
                }
                check_tokens(sizes, f"tasks.{name}")

    def _heads(self, task: Task) -> dict[str, Any]:
        return task.objective.heads(self.run.model.trunk.width, task.inputs)

    @cached_property
    def flops(self) -> Mapping[str, int]:
        """Model FLOPs of each training program, whatever the mesh; traced when first asked for."""
        mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        return {name: r.model_flops() for name, r in train_requests(self, mesh).items()}

    def abstract_state(self, mesh: Mesh) -> State:
        """Return the shapes and shardings of the state on a mesh; traced once for each mesh."""
        if mesh not in self._states:
            whole, dtype = self.optimizers.whole, self.spec.dtype
            self._states[mesh] = abstract_state(self.declaration, whole, dtype, mesh)
        return self._states[mesh]

    @cached_property
    def _states(self) -> dict[Mesh, State]:
        """Abstract states by mesh."""
        return {}

    def passes(self) -> list[tuple[Task, Pass]]:
        """Return all evaluation passes; those of one task, output and source are one, with the fields of all."""
        passes_by_program: dict[str, tuple[Task, Pass]] = {}
        for name, evaluators in self.evaluators.items():
            task = self.tasks[name]
            for evaluator in evaluators.values():
                for pass_ in evaluator.passes(task).values():
                    _, before = passes_by_program.get(pass_key(task, pass_), (task, pass_))
                    fields = tuple(sorted({*before.fields, *pass_.fields}))
                    passes_by_program[pass_key(task, pass_)] = (task, replace(pass_, fields=fields))
        return list(passes_by_program.values())


def make_experiment(block: Mapping[str, Any], folder: str = "") -> Experiment:
    """Check a config and build what it names.

    Args:
      block: the config as plain data.
      folder: where modalities find their files instead of the folder in the config (a run's assets).
    """
    with configs.noting() as used:
        experiment = _build(block, folder, used)
    experiment.check()
    return experiment


def _build(block: Mapping[str, Any], folder: str, used: Iterable[tuple[str, str]]) -> Experiment:
    run = configs.build(RunConfig, block, "config")
    _check_values(run)
    modalities: dict[str, Modality] = {}
    for name, inner in run.modalities.items():
        modality = configs.component("modalities", inner, f"modalities.{name}")
        modalities[name] = replace(modality, folder=folder) if folder else modality
    tasks = {name: make_task(name, inner, modalities) for name, inner in run.tasks.items()}
    heads = [
        (t.objective.head, t.objective.heads(run.model.trunk.width, t.inputs))
        for t in tasks.values()
    ]
    declaration = declare_model(run.model, modalities, heads)
    teachers = make_teachers(run.model.teachers, declaration.specs, tasks)
    declaration.teach({name: teacher.parameters for name, teacher in teachers.items()})
    evaluators = {name: make_evaluators(task) for name, task in tasks.items()}
    for name, by_name in evaluators.items():
        for source in (e.source for e in by_name.values() if "name" in e.source):
            configs.component("sources", source, f"tasks.{name}.evaluators.source")
    for rule in (run.schedule.rule, *(phase.rule for phase in run.schedule.phases)):
        if rule in configs.names("rules"):  # others are refused with the schedule
            configs.resolve("rules", rule, "schedule.rule")
    extensions = configs.digests_of_extensions(used)
    return Experiment(
        dict(block), run, modalities, tasks, evaluators, declaration, extensions, teachers
    )


def _check_values(run: RunConfig) -> None:
    if not run.tasks:
        raise UserError("config.tasks is empty; a run needs a task.")
    for kind, names in {"tasks": run.tasks, "modalities": run.modalities}.items():
        for name in names:
            # They become parts of parameter names, of dotted config keys and of file names.
            if not re.fullmatch(r"\w+", name):
                raise UserError(
                    f"config.{kind}: '{name}' is no name; use letters, digits and underscores."
                )
