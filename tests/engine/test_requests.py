"""The programs of an experiment: which there are, and that equal ones are made once."""

from __future__ import annotations

import jax
import pytest
import toyrun

from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.requests import eval_requests, pass_key, program_key, train_requests
from mmjax.experiment import Experiment, make_experiment

EVALUATORS = (
    "tasks.one.evaluators={'loss': {'name': 'held_out_loss', 'source': {'name': 'toy', 'count': 16}}, "
    "'again': {'name': 'held_out_loss', 'source': {'name': 'toy', 'count': 16}}, "
    "'longer': {'name': 'held_out_loss', 'source': {'name': 'toy', 'count': 24}}}"
)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    phase = "schedule.phases=[{'start': 6, 'tasks': {'two': {'batch': 8}}}]"
    return make_experiment(toyrun.block(EVALUATORS, phase))


def test_each_task_has_a_program_for_each_of_its_shapes(experiment: Experiment) -> None:
    made = train_requests(experiment, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert set(made) == {"one", "two", "two@6"}
    assert {name: request.task for name, request in made.items()} == {n: n for n in made}
    assert all(request.kind == "train" for request in made.values())
    assert [made[n].shape for n in ("two", "two@6")] != [made["two"].shape] * 2


def test_passes_share_programs_and_equal_passes_are_one(experiment: Experiment) -> None:
    passes = [(task, each) for task, each in experiment.passes() if task.name == "one"]
    assert len(passes) == 2  # of 16 examples, twice the same, and of 24
    assert len({pass_key(*each) for each in passes}) == 2
    assert len({program_key(*each) for each in passes}) == 1
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert set(eval_requests(experiment, mesh)) == {"one/loss", "two/loss"}
