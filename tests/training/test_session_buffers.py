"""A run whose model has buffers: resumed, loaded, evaluated, begun from, and changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath

import mmjax
from mmjax import evaluate
from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.parameters import STAT, to_canonical
from mmjax.core.sharding import make_mesh
from mmjax.engine import checkpoint
from mmjax.engine.state import EMA
from mmjax.engine.warm_start import WarmStartConfig, warm_start
from mmjax.experiment import make_experiment
from mmjax.show import read_whole
from mmjax.training.evaluation import read_results
from mmjax.training.initial_state import Fresh, initial_state
from mmjax.training.session import begin

WORDS = (
    "model.layers=[{'repeat': 2, 'blocks': [{'name': 'toy_buffers'}]}]",
    "tasks.one.objective={'name': 'toy_buffers'}",
    "optimizer.ema=0.9",
)
ROWS = "stat/heads/one/labels/rows"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 12 steps, which no test changes."""
    folder = tmp_path_factory.mktemp("buffers")
    toyrun.run(folder, *WORDS)
    return folder


def saved(folder: Path, step: int = 12) -> dict[str, np.ndarray[Any, Any]]:
    whole = read_whole(epath.Path(folder), step, checkpoint.read_shapes(epath.Path(folder), step))
    return {n.removeprefix("buffers/"): x for n, x in whole.items() if n.startswith("buffers/")}


def test_a_run_that_was_stopped_comes_to_the_same_bits(run: Path, tmp_path: Path) -> None:
    toyrun.run(tmp_path, *WORDS, "steps=8")
    before = saved(tmp_path, 8)
    toyrun.run(tmp_path, *WORDS)
    assert toyrun.bits(tmp_path) == toyrun.bits(run)
    codes = "stat/trunk/layers/001/codes"
    assert (saved(tmp_path)[codes] != before[codes]).any()


def test_loading_and_evaluation_use_both_averages_and_write_nothing(run: Path) -> None:
    arrays, before = saved(run), toyrun.bits(run)
    model = mmjax.load(str(run))
    assert set(model.buffers) == {n for n in arrays if n.startswith(STAT)}
    for name, x in model.buffers.items():
        np.testing.assert_array_equal(x, arrays[EMA + name])
    codes = "stat/trunk/layers/000/codes"
    assert (model.buffers[codes] != arrays[codes]).any()
    module = model.module.trunk.groups[0].blocks[0]
    np.testing.assert_array_equal(module.codes[...][0], arrays[EMA + codes])
    records, results = evaluate.evaluate(epath.Path(run), None, ()), read_results(epath.Path(run))
    assert results  # of one device, and these of all
    wanted = [r["value"] for r in results]
    np.testing.assert_allclose([r["value"] for r in records], wanted, rtol=1e-5)
    assert toyrun.bits(run) == before


@pytest.mark.parametrize("average", [False, True])
def test_a_run_that_begins_from_another_takes_its_buffers(run: Path, average: bool) -> None:
    experiment = make_experiment(toyrun.block(*WORDS))
    mesh, specs = make_mesh(experiment.run.mesh, jax.devices()[:1]), experiment.declaration.read
    values = warm_start(WarmStartConfig(str(run), average=average), specs, print)
    state, arrays = initial_state(experiment, mesh, Fresh(values)), saved(run)
    stats = {n: x for n, x in state.buffers.items() if n.startswith(STAT)}
    for name, x in to_canonical(specs, stats).items():
        np.testing.assert_array_equal(x, arrays[EMA * average + name])
    codes = "stat/trunk/groups/0/blocks/0/codes"
    np.testing.assert_array_equal(state.buffers[EMA + codes], state.buffers[codes])


def test_a_buffer_that_is_new_or_gone_is_announced_under_allow_change(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's buffer `rows` has another name now."""
    copy = shutil.copytree(run, tmp_path / "copy")
    block = toyrun.block(*WORDS, "steps=20")
    heads = configs.resolve("objectives", "toy_buffers", "here").heads

    def renamed(self: Any, *arguments: Any) -> Any:
        parts = heads(self, *arguments)
        parts["labels"].others = parts["labels"].rows
        del parts["labels"].rows
        return parts

    monkeypatch.setattr(configs.resolve("objectives", "toy_buffers", "here"), "heads", renamed)
    experiment = make_experiment(block)
    mesh, said = make_mesh(experiment.run.mesh, jax.devices()[:1]), list[str]()
    with pytest.raises(UserError, match="has no stat/heads/one/labels/others.*--allow_change"):
        begin(experiment, epath.Path(copy), mesh, False, said.append)
    session = begin(experiment, epath.Path(copy), mesh, True, said.append)
    lines = "\n".join(said)
    assert "has no stat/heads/one/labels/others, which starts as its module declares it" in lines
    assert f"holds {ROWS}, which nothing in the config declares now; it is dropped" in lines
    state = initial_state(experiment, mesh, session.start)
    np.testing.assert_array_equal(state.buffers["stat/heads/one/labels/others"], np.zeros(3))
    labels = "stat/heads/one/labels/mean"
    np.testing.assert_array_equal(state.buffers[labels], saved(run)[labels])
