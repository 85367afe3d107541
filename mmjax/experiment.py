"""An experiment: a checked config, and what it names, built. Shared by every main."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from mmjax.core import config as configs
from mmjax.core.errors import UserError, nearest
from mmjax.core.parameters import Declaration
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.compile import Request
from mmjax.engine.state import State, abstract_state, compute_dtype, evaluated
from mmjax.engine.steps import eval_request, positions, reach_of, train_request
from mmjax.evaluators.base import Evaluator, Pass, make_evaluators
from mmjax.modalities.base import Modality
from mmjax.model import declare_model
from mmjax.optim.optimizer import PARTS, Optimizer
from mmjax.optim.reach import Reach
from mmjax.optim.rules import apply_rules, trained
from mmjax.optim.views import SHARED, View, check_kind, in_common, make_view
from mmjax.run_config import RunConfig
from mmjax.schedule.buckets import check_tokens
from mmjax.schedule.phases import Setting, Settings, make_settings
from mmjax.schedule.schedule import Schedule
from mmjax.schedule.stretches import BUDGET, Stretch, from_config, key_of, stretches
from mmjax.task import Task, make_task


@dataclass(frozen=True)
class Experiment:
    """What a config names, built; nothing is opened or compiled yet.

    Attributes:
      block: the config as plain data.
      run: the config, checked.
      modalities, tasks, evaluators: by name; evaluators by task and name.
      declaration: the model's parameters, declared.
      extensions: SHA-256 of the files outside mmjax that the config names, by `KIND/NAME`.
    """

    block: dict[str, Any]
    run: RunConfig
    modalities: Mapping[str, Modality]
    tasks: Mapping[str, Task]
    evaluators: Mapping[str, Mapping[str, Evaluator]]
    declaration: Declaration
    extensions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def settings(self) -> Settings:
        """What holds from which step on."""
        rules, phases = self.run.optimizer.rules, self.run.schedule.phases
        return make_settings(self.tasks, phases, rules, self.modalities)

    @property
    def used(self) -> dict[str, Modality]:
        """The modalities that tasks read, by name: those whose files a run needs."""
        names = {name for task in self.tasks.values() for name in task.inputs}
        return {name: m for name, m in self.modalities.items() if name in names}

    @property
    def optimizer(self) -> Optimizer:
        """Of the whole run: its state is of all that any phase moves."""
        return Optimizer(self.run.optimizer, self.declaration.specs, self._length, self.views)

    def optimizer_of(self, setting: Setting) -> Optimizer:
        """As it is under a setting, over the same state."""
        config = replace(self.run.optimizer, rules=setting.rules)
        return Optimizer(
            config,
            self.declaration.specs,
            self._length,
            self._views(setting),
            in_common(self.views),
        )

    @cached_property
    def views(self) -> Mapping[str, View]:
        """How each task sees the optimizer, all phases taken together."""
        each = [self._views(setting) for setting in self.settings.each]
        return {
            name: View(view.kind, frozenset[str]().union(*(views[name].moves for views in each)))
            for name, view in each[0].items()
        }

    def _views(self, setting: Setting) -> dict[str, View]:
        moving = trained(setting.rules, self.declaration.specs)
        return {
            name: make_view(kind, moving, None if kind == SHARED else self._reaches[name])
            for name, kind in self._kinds().items()
        }

    @cached_property
    def _reaches(self) -> Mapping[str, Reach]:
        """What is traced of the losses of tasks that do not share all."""
        kinds = self._kinds()
        return {n: self._reach(task) for n, task in self.tasks.items() if kinds[n] != SHARED}

    def _kinds(self) -> dict[str, str]:
        default = self.run.optimizer.update_scope
        return {
            name: check_kind(task.config.update_scope, f"tasks.{name}.update_scope")
            if task.config.update_scope
            else check_kind(default, "optimizer.update_scope")
            for name, task in self.tasks.items()
        }

    def check(self) -> None:
        """Raise what is wrong with the config as a whole: now, and not when the run begins."""
        self._check_schedule()
        self._check_accumulation(self._kinds())
        for setting in self.settings.each:
            apply_rules(setting.rules, self.declaration.specs)
        self._check_shapes()

    def _check_schedule(self) -> None:
        config = self.run.schedule
        for index, phase in enumerate(config.phases):
            where = f"schedule.phases[{index}]"
            _check_weights(phase.weights or {}, self.tasks, f"{where}.weights")
            _check_weights(phase.intervals or {}, self.tasks, f"{where}.intervals")
        self._check_numbers()
        self.schedule(lambda start: dict.fromkeys(self.tasks, 1.0))
        if config.rebalance_every and all(each.rule != BUDGET for each in self.stretches()):
            raise UserError(
                f"config.schedule.rebalance_every is {config.rebalance_every}, but no stretch has the rule '{BUDGET}'. "
                "Set schedule.rule, or leave rebalance_every at 0."
            )

    def _check_numbers(self) -> None:
        """Raise where a weight or an interval is set that no rule of the run reads."""
        read = {key_of(each.rule) for each in self.stretches()}
        for key, other in (("weight", "interval"), ("interval", "weight")):
            named = [n for n, number in self._numbers(key).items() if number != 1]
            if key not in read and (
                named or any(getattr(p, f"{key}s") for p in self.run.schedule.phases)
            ):
                where = f"tasks.{named[0]}.{key}" if named else f"{key}s of schedule.phases"
                raise UserError(
                    f"{where} is set, but no rule of the schedule reads it: '{self.run.schedule.rule}' reads "
                    f"'{other}'. Set that, or another schedule.rule."
                )

    def _check_shapes(self) -> None:
        """Phases and buckets may change the shapes of data, and of no parameter; buckets, no number of tokens."""
        for task, _ in self.settings.programs.values():
            if task is self.tasks[task.name]:
                continue
            both = [(t.objective.head, self._heads(t)) for t in (self.tasks[task.name], task)]
            declare_model(self.run.model, self.modalities, both)
        for setting in self.settings.each:
            for name, variants in setting.variants.items():
                sizes = {
                    v.bucket: Fraction(
                        positions(v.task, self.declaration, v.task.rows().batch(v.task.batch)),
                        v.task.batch,
                    )
                    for v in variants
                    if v.bucket
                }
                check_tokens(sizes, f"tasks.{name}")

    def _heads(self, task: Task) -> dict[str, Any]:
        return task.objective.heads(self.run.model.trunk.width, task.inputs)

    def _check_accumulation(self, kinds: Mapping[str, str]) -> None:
        every = self.run.optimizer.accumulate
        own = [task for task, kind in kinds.items() if kind != SHARED]
        if every > 1 and own:
            raise UserError(
                f"optimizer.accumulate is {every}, which makes one update of several tasks' steps; task "
                f"'{own[0]}' has the view '{kinds[own[0]]}'. Set its view to '{SHARED}', or accumulate to 1."
            )

    def _reach(self, task: Task) -> Reach:
        dtype, compute = map(compute_dtype, (self.run.dtype.parameters, self.run.dtype.compute))
        return reach_of(task, self.declaration, dtype, compute, self.run.seed)

    def _length(self, task: str) -> int:
        """The run's length for a task in `optimizer.unit`: as its schedule has it from step 0."""
        if self.run.optimizer.unit == "steps":
            return self.run.steps
        return (
            self._examples if self.run.optimizer.unit == "examples" else self._visits.get(task, 0)
        )

    @cached_property
    def _visits(self) -> Mapping[str, int]:
        return self.schedule().visits(self.run.steps)

    @cached_property
    def _examples(self) -> int:
        schedule, steps = self.schedule(), self.run.steps
        return sum(self.settings.consumed(schedule, name, 0, steps) for name in self.tasks)

    def progress(self, task: str, step: int, positions: Mapping[str, int]) -> dict[str, float]:
        """Return what a task's update asks of the clock besides step and visit, as ticks of a program."""
        ticks = {**self._extents[task], "scale": self.settings.at(step).scale}
        if self.run.optimizer.accumulate > 1:
            ticks["last"] = int(step + 1 == self.run.steps)
        if self.run.optimizer.unit == "examples":
            ticks["part"] = min(sum(positions.values()) * PARTS // self._examples, PARTS)
        return ticks

    @cached_property
    def _extents(self) -> Mapping[str, Mapping[str, float]]:
        optimizer = self.optimizer
        return {task: optimizer.extent(task) for task in self.tasks}

    def stretches(self) -> list[Stretch]:
        """The schedule as the config describes it."""
        config = self.run.schedule
        return stretches(
            config.rule, self._numbers("weight"), config.phases, self._numbers("interval")
        )

    def schedule(self, seconds: Callable[[int], Mapping[str, float]] | None = None) -> Schedule:
        """The schedule from step 0 as the config describes it, in integers.

        Args:
          seconds: step -> seconds of a step of each task then, for stretches under `budget`; model FLOPs if None.
        """
        config = self.run.schedule
        seconds = seconds or self.flops_at
        weights, intervals = self._numbers("weight"), self._numbers("interval")
        return from_config(config.rule, weights, self.run.seed, config.phases, seconds, intervals)

    def flops_at(self, step: int) -> dict[str, float]:
        """Model FLOPs of a training step of each task, as it is at a step; the mean over its buckets."""
        return {t: v.mean(self.flops) for t, v in self.settings.at(step).variants.items()}

    def _numbers(self, key: str) -> dict[str, int]:
        """Return `weight` or `interval` of each task."""
        return {name: getattr(task.config, key) for name, task in self.tasks.items()}

    @cached_property
    def flops(self) -> Mapping[str, int]:
        """Model FLOPs of each training program, whatever the mesh; traced when first asked for."""
        mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        return {name: r.model_flops() for name, r in self.train_requests(mesh).items()}

    def abstract_state(self, mesh: Mesh) -> State:
        return abstract_state(
            self.declaration, self.optimizer, compute_dtype(self.run.dtype.parameters), mesh
        )

    def train_requests(self, mesh: Mesh) -> dict[str, Request]:
        """The training programs of all tasks in all phases, by name (see `Setting.programs`)."""
        compute, state = compute_dtype(self.run.dtype.compute), self.abstract_state(mesh)
        _ = self._extents  # which may trace, as the loop must not

        def request(name: str, task: Task, setting: Setting) -> Request:
            optimizer = self.optimizer_of(setting)
            made = train_request(
                task, self.declaration, optimizer, compute, self.run.seed, state, mesh
            )
            return replace(made, task=name)

        return {
            name: request(name, task, setting)
            for name, (task, setting) in self.settings.programs.items()
        }

    def passes(self) -> list[tuple[Task, Pass]]:
        """All evaluation passes; those of one task, output and source are one, with the fields of all."""
        found: dict[str, tuple[Task, Pass]] = {}
        for name, evaluators in self.evaluators.items():
            task = self.tasks[name]
            for evaluator in evaluators.values():
                for each in evaluator.passes(task).values():
                    _, before = found.get(pass_key(task, each), (task, each))
                    fields = tuple(sorted({*before.fields, *each.fields}))
                    found[pass_key(task, each)] = (task, replace(each, fields=fields))
        return list(found.values())

    def eval_requests(self, mesh: Mesh) -> dict[str, Request]:
        """The programs of the evaluation passes, by `program_key`."""
        compute = compute_dtype(self.run.dtype.compute)
        parameters = evaluated(self.abstract_state(mesh))
        size = self.run.evaluation.batch
        requests: dict[str, Request] = {}
        for task, each in self.passes():
            key = program_key(task, each)
            if key not in requests:
                requests[key] = eval_request(
                    task,
                    each.computation,
                    size,
                    self.declaration,
                    compute,
                    self.run.seed,
                    parameters,
                    mesh,
                )
        return requests


def program_key(task: Task, each: Pass) -> str:
    """Passes with one key run one program."""
    return f"{task.name}/{each.computation}"


def pass_key(task: Task, each: Pass) -> str:
    """Passes with one key read the same examples and compute the same."""
    return f"{task.name}/{each.computation}/{sorted(each.block.items())}"


def make_experiment(block: Mapping[str, Any], folder: str = "") -> Experiment:
    """Check a config and build what it names.

    Args:
      block: the config as plain data.
      folder: where modalities find their files instead of the folder the config says (a run's assets).
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
    evaluators = {name: make_evaluators(task) for name, task in tasks.items()}
    for name, each in evaluators.items():
        for source in (e.source for e in each.values() if "name" in e.source):
            configs.component("sources", source, f"tasks.{name}.evaluators.source")
    for rule in (run.schedule.rule, *(phase.rule for phase in run.schedule.phases)):
        if rule in configs.names("rules"):  # others are refused with the schedule
            configs.resolve("rules", rule, "schedule.rule")
    extensions = configs.digests_of_extensions(used)
    return Experiment(dict(block), run, modalities, tasks, evaluators, declaration, extensions)


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


def _check_weights(weights: Mapping[str, int], tasks: Mapping[str, Any], where: str) -> None:
    for name in weights:
        if name not in tasks:
            raise UserError(f"Config key '{where}': no task '{name}'.{nearest(name, tasks)}")
