"""Experiments: values that could not run are refused, and passes that are alike are one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest

from mmjax import experiment as experiments
from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.requests import eval_requests, pass_key, program_key, train_requests
from mmjax.evaluators.base import Embed
from mmjax.experiment import Experiment, make_experiment
from mmjax.optim.optimizer import PARTS

TINY = Path(__file__).resolve().parent / "configs" / "tiny.py"


def experiment(*overrides: str, **more: Any) -> Experiment:
    return make_experiment(configs.override(configs.read_file(str(TINY)), overrides), **more)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", "'config.stepz'. Did you mean 'steps'?"),
        ("model.widht=3", "'config.model.widht'. Did you mean 'width'?"),
        ("optimizer.lerning_rate=1", "Did you mean 'learning_rate'?"),
        ("mesh.date=1", "'config.mesh.date'. Did you mean 'data'?"),
        ("modalities.image.ptch=3", "'modalities.image.ptch'. Did you mean 'patch'?"),
        ("modalities.image.name='imge'", "modalities.image.name: no 'imge'"),
        ("modalities.image=5", "'config.modalities.image' is 5; expected a block of keys"),
        ("tasks.image_text.evaluators.groups.lable='x'", "evaluators.groups.lable'. Did you mean"),
        ("tasks.image_text.evaluators.groups.name='zero'", "no 'zero' in mmjax/evaluators"),
        ("steps=0", "config.steps is 0; it must be at least 1"),
        ("limits.max_non_finite_steps=0", "config.limits.max_non_finite_steps is 0; it must be at least 1"),
        ("steps=-3", "config.steps is -3"),
        ("steps=1.5", "'config.steps' is 1.5; expected int"),
        ("model.width=0", "config.model.width is 0"),
        ("model.width=33", "33"),
        ("model.layers=[]", "model.layers"),
        ("model.layers=[{'repeat': 0, 'blocks': []}]", "model.layers"),
        ("model.layers=[{'repeat': 1, 'blocks': [{'name': 'transfomer'}]}]", "'transformer'"),
        ("model.layers=[{'repeat': 1, 'blocks': [{'name': 'transformer', 'num_heads': 2, 'mlp_dm': 4}]}]", "mlp_dm"),
        ("evaluation.batch=0", "config.evaluation.batch is 0"),
        ("evaluation.every=-1", "config.evaluation.every is -1"),
        ("checkpoint.every=-1", "config.checkpoint.every is -1"),
        ("checkpoint.keep=0", "config.checkpoint.keep is 0"),
        ("log.flush_every=0", "config.log.flush_every is 0"),
        ("loader.threads=-1", "config.loader.threads is -1"),
        ("tasks={}", "config.tasks is empty"),
        ("tasks.image_text.weight=-1", "tasks.image_text.weight is -1; it must be at least 0"),
        ("schedule.rule='share'", "Did you mean 'shares'?"),
        ("schedule.phases=[{'weights': {'image_text': 1}}]", "schedule.phases[0].start' is missing"),
        ("schedule.phases=[{'start': 3, 'weights': 5}]", "schedule.phases[0].weights' is 5"),
        (
            "schedule.phases=[{'start': 3, 'weights': {'imagetext': 1}}]",
            "no task 'imagetext'. Did you mean 'image_text'?",
        ),
        ("schedule.phases=[{'begin': 3, 'weights': {'image_text': 1}}]", "'config.schedule.phases[0].begin'"),
        ("dtype.compute='float16'", "float16"),
    ],
)  # fmt: skip
def test_a_config_that_could_not_run_is_refused_by_key(override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        made = experiment(override)
        eval_requests(made, make_mesh(made.run.mesh))


@pytest.mark.parametrize("kind", ["tasks", "modalities"])
@pytest.mark.parametrize("name", ["a/b", "a b", "", "a-b"])
def test_names_that_become_paths_are_words(kind, name):
    block = configs.read_file(str(TINY))
    block[kind][name] = next(iter(block[kind].values()))
    with pytest.raises(UserError, match=f"config.{kind}: '{name}' is no name"):
        make_experiment(block)


def test_missing_keys_are_named():
    for key in ("steps", "modalities", "model", "tasks"):
        block = {k: v for k, v in configs.read_file(str(TINY)).items() if k != key}
        with pytest.raises(UserError, match=f"'config.{key}' is missing"):
            make_experiment(block)


def test_two_tasks_may_share_a_head_of_one_shape_only():
    block = configs.read_file(str(TINY))
    other = configs.override(block["tasks"]["image_text"], ["objective.head='image_text'"])
    shared = {**block, "tasks": {**block["tasks"], "again": other}}
    heads = [n for n in make_experiment(shared).declaration.specs if n.startswith("heads/")]
    assert heads == [n for n in experiment().declaration.specs if n.startswith("heads/")]
    with pytest.raises(UserError, match="'image_text'.*different shapes.*another head name"):
        make_experiment(configs.override(shared, ["tasks.again.objective.embed_dim=24"]))


def test_the_schedule_is_the_tasks_shares_in_their_order():
    schedule = experiment("tasks.masked_image.weight=2").planned.schedule()
    assert schedule.realised_shares(0, 12) == {"image_text": 0.5, "masked_image": 0.5}
    assert schedule.task(0) == "image_text"
    phases = "schedule.phases=[{'start': 4, 'weights': {'masked_image': 1}}]"
    later = experiment(phases).planned.schedule()
    assert {later.task(s) for s in range(4, 30)} == {"masked_image"}


def test_passes_that_are_alike_are_read_and_run_once():
    made = experiment()
    found = made.passes()
    keys = [pass_key(task, each) for task, each in found]
    assert len(keys) == len(set(keys)) == 3, "image and text vectors, and the masked loss"
    images = next(each for _, each in found if each.computation == Embed("image"))
    assert set(images.fields) == {"concept", "group"}, "what retrieval and zero-shot want together"
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert set(eval_requests(made, mesh)) == {program_key(task, each) for task, each in found}


def test_another_split_is_another_pass_of_the_same_program():
    source = "{'name': 'tfds', 'dataset': 'emoji', 'split': 'test_concept'}"
    more = f"tasks.image_text.evaluators.concepts={{'name': 'retrieval', 'source': {source}}}"
    made = experiment(more, "tasks.image_text.evaluators.groups.source=" + source)
    passes = [(t, p) for t, p in made.passes() if p.computation == Embed("image")]
    assert len(passes) == 2
    # Though they want other fields: those stay on the host.
    assert {p.fields for _, p in passes} == {("concept",), ("concept", "group")}
    requests = eval_requests(made, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert [r.kind for r in requests.values()].count("embed/image") == 1
    assert len(requests) == 3


def test_a_request_for_every_task():
    made = experiment()
    requests = train_requests(made, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert list(requests) == ["image_text", "masked_image"]
    assert {r.kind for r in requests.values()} == {"train"}


def test_modalities_find_their_files_in_a_runs_assets(tmp_path):
    made = experiment(folder=str(tmp_path))
    [path] = made.modalities["text"].files().values()
    assert str(path).startswith(str(tmp_path))
    assert made.tasks["image_text"].inputs["text"].modality is made.modalities["text"]


def test_progress_by_examples_ends_where_the_run_would() -> None:
    """More examples than planned (a task excluded, a copy of a run with fewer tasks) leave the rate at its end."""
    made = experiment("optimizer.unit=examples")
    assert made.optimizers.progress("image_text", 0, {"image_text": 0})["part"] == 0
    assert made.optimizers.progress("image_text", 0, {"image_text": 10**9})["part"] == PARTS


def test_a_warm_up_longer_than_the_run_never_ends() -> None:
    made = experiment("optimizer.unit=examples", "optimizer.warmup=100000", "steps=2")
    rate = made.optimizers.whole.rate("image_text", {"part": jax.numpy.int32(PARTS // 2)})
    assert 0 < rate < made.run.optimizer.learning_rate


def test_the_shapes_of_the_state_are_traced_once_for_each_mesh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny, meshes = experiment(), []
    traced = experiments.abstract_state
    monkeypatch.setattr(
        experiments, "abstract_state", lambda *words: meshes.append(words[-1]) or traced(*words)
    )
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    two = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    states = [tiny.abstract_state(mesh) for mesh in (one, two, one, two)]
    assert meshes == [one, two] and states[0] is states[2] and states[1] is states[3]
    devices = [{x.sharding.mesh for x in jax.tree.leaves(state)} for state in states[:2]]
    assert devices == [{one}, {two}]
