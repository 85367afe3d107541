"""A run with a teacher: resumed, evaluated, loaded and begun from; and a frozen one of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath

import mmjax
from mmjax import evaluate
from mmjax.core.errors import UserError
from mmjax.core.sharding import make_mesh
from mmjax.engine import checkpoint
from mmjax.experiment import make_experiment
from mmjax.show import read_whole
from mmjax.training.evaluation import read_results
from mmjax.training.initial_state import initial_state
from mmjax.training.session import begin

TEACHER: dict[str, Any] = {"of": ["stems/.*", "trunk/.*", "heads/one/.*"], "decay": 0.9}
WORDS = ("tasks.one.objective={'name': 'toy_teacher'}", f"model.teachers.old={TEACHER}")
KERNEL = "trunk/layers/001/inner/kernel"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    toyrun.run(folder, *WORDS)
    return folder


def saved(folder: Path, step: int = 12) -> dict[str, np.ndarray[Any, Any]]:
    shapes = checkpoint.read_shapes(epath.Path(folder), step)
    whole = read_whole(epath.Path(folder), step, shapes)
    return {n.partition("/")[2]: x for n, x in whole.items() if not n.startswith("optimizer/")}


def begun(folder: Path, *words: str, allow: bool = False) -> tuple[Any, str]:
    experiment, said = make_experiment(toyrun.block(*words)), list[str]()
    mesh = make_mesh(experiment.run.mesh, jax.devices()[:1])
    session = begin(experiment, epath.Path(folder), mesh, allow, said.append)
    return session.canonical(initial_state(experiment, mesh, session.start)), "\n".join(said)


def test_a_run_that_was_killed_comes_to_the_same_bits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decay is that of a run of 12 steps before and after."""
    calls = []

    def wrap(call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 7:
                raise KeyboardInterrupt
            return call(*arguments)

        return counted

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        toyrun.wrap_calls(patch, wrap)
        toyrun.run(tmp_path, *WORDS)
    assert checkpoint.steps(epath.Path(tmp_path))[0] == 4
    toyrun.run(tmp_path, *WORDS)
    assert toyrun.bits(tmp_path) == toyrun.bits(run)
    arrays = saved(run)
    assert (arrays[f"teacher/old/{KERNEL}"] != arrays[KERNEL]).any()


def test_evaluation_and_loading_read_it(run: Path) -> None:
    records, results = evaluate.evaluate(epath.Path(run), None, ()), read_results(epath.Path(run))
    assert results  # of one device, and these of all
    wanted = [r["value"] for r in results]
    np.testing.assert_allclose([r["value"] for r in records], wanted, rtol=1e-5)
    model = mmjax.load(str(run))
    assert not [n for n in model.parameters if n.startswith("teacher/")] and not model.buffers
    np.testing.assert_array_equal(model.parameters[KERNEL], saved(run)[KERNEL])


def test_a_run_from_a_run_with_the_teacher_takes_both_by_name(run: Path, tmp_path: Path) -> None:
    state, _ = begun(tmp_path, *WORDS, f"init_from.path={run}")
    arrays = saved(run)
    assert (arrays[f"teacher/old/{KERNEL}"] != arrays[KERNEL]).any()
    for name in arrays:
        part = "buffers" if name.startswith("teacher/") else "parameters"
        np.testing.assert_array_equal(state[part][name], arrays[name])


def test_a_run_from_one_without_copies_what_it_takes(run: Path, tmp_path: Path) -> None:
    """Under another name, it begins at the student's parameters, after `init_from`."""
    objective = "tasks.one.objective={'name': 'toy_teacher', 'teacher': 'new'}"
    state, _ = begun(
        tmp_path,
        objective,
        f"model.teachers.new={TEACHER}",
        f"init_from.path={run}",
        "init_from.ignore=['heads/two/.*']",
    )
    np.testing.assert_array_equal(state["buffers"][f"teacher/new/{KERNEL}"], saved(run)[KERNEL])


def test_a_frozen_teacher_is_read_from_a_run_and_its_step_is_pinned(
    run: Path, tmp_path: Path
) -> None:
    frozen = {"of": ["stems/.*", "trunk/.*", "heads/one/.*"], "kind": "frozen", "path": str(run)}
    state, said = begun(tmp_path, WORDS[0], f"model.teachers.old={frozen}", "seed=3")
    arrays = saved(run)
    np.testing.assert_array_equal(state["buffers"][f"teacher/old/{KERNEL}"], arrays[KERNEL])
    assert (np.asarray(state["parameters"][KERNEL]) != arrays[KERNEL]).any()
    assert "Initialised" in said and (tmp_path / "teacher.old.json").exists()


def test_a_teacher_that_is_new_or_gone_is_announced_under_allow_change(
    run: Path, tmp_path: Path
) -> None:
    words = (WORDS[0], f"model.teachers.old={ {**TEACHER, 'of': ['trunk/.*']} }")
    toyrun.run(tmp_path, *words, "steps=1", "evaluation.every=0")
    with pytest.raises(UserError, match="allow_change"):
        begun(tmp_path, *WORDS)
    state, said = begun(tmp_path, *WORDS, "steps=1", "evaluation.every=0", allow=True)
    assert "has no teacher/old/heads/one/out/kernel, which starts as what it copies" in said
    name = "heads/one/out/kernel"
    np.testing.assert_array_equal(state["buffers"][f"teacher/old/{name}"], saved(tmp_path, 1)[name])
