"""The programs of an experiment: all that is compiled before step 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from jax.sharding import Mesh

from mmjax.engine.compile import Request
from mmjax.engine.optimizers import Optimizers
from mmjax.engine.state import State, evaluated
from mmjax.engine.steps import ModelSpec, eval_request, train_request
from mmjax.evaluators.base import Pass
from mmjax.schedule.phases import Phases
from mmjax.task import Task


class Programs(Protocol):
    """An experiment, as far as its programs depend on it."""

    @property
    def spec(self) -> ModelSpec:
        """The model, and how it computes."""

    @property
    def phases(self) -> Phases:
        """The phases of the run, by ascending start."""

    @property
    def optimizers(self) -> Optimizers:
        """The optimizer under each phase."""

    @property
    def evaluation_batch(self) -> int:
        """Examples of an evaluation step."""

    def passes(self) -> Sequence[tuple[Task, Pass]]:
        """Return the evaluation passes of each task."""

    def abstract_state(self, mesh: Mesh) -> State:
        """Return the shapes and shardings of the state on a mesh."""


def train_requests(experiment: Programs, mesh: Mesh) -> dict[str, Request]:
    """Return the training programs of all tasks in all phases, by name (see `Phases.programs`)."""
    state, optimizers = experiment.abstract_state(mesh), experiment.optimizers
    _ = optimizers.extents  # which may trace, as the loop must not
    return {
        name: replace(
            train_request(experiment.spec, task, optimizers.of(phase), state, mesh), task=name
        )
        for name, (task, phase) in experiment.phases.programs.items()
    }


def eval_requests(experiment: Programs, mesh: Mesh) -> dict[str, Request]:
    """Return the programs of the evaluation passes, by `program_key`."""
    parameters, size = evaluated(experiment.abstract_state(mesh)), experiment.evaluation_batch
    requests: dict[str, Request] = {}
    for task, pass_ in experiment.passes():
        key = program_key(task, pass_)
        if key not in requests:
            request = eval_request(experiment.spec, task, pass_.computation, size, parameters, mesh)
            requests[key] = request
    return requests


def program_key(task: Task, pass_: Pass) -> str:
    """Return the name of a pass's program: passes with one key run one program."""
    return f"{task.name}/{pass_.computation}"


def pass_key(task: Task, pass_: Pass) -> str:
    """Return the name of what a pass reads and computes: passes with one key are one."""
    return f"{task.name}/{pass_.computation}/{sorted(pass_.block.items())}"
