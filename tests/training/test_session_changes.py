"""Resuming a run under a changed config."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from harness import contents, deterministic
from metafile import edited
from resumed import BATCH, ids
from toyrun import block, run, watched

from mmjax.core.errors import UserError
from mmjax.core.sharding import make_mesh
from mmjax.engine import checkpoint
from mmjax.experiment import make_experiment
from mmjax.modalities.text import Text
from mmjax.schedule.schedule import Schedule
from mmjax.training.session import begin


def test_another_share_is_refused_with_words(half: Path) -> None:
    before = contents(half)
    with pytest.raises(UserError) as error:
        run(half, "tasks.one.weight=1")
    assert "tasks.one.weight (schedule): saved 2, now 1" in str(error.value)
    assert "--allow_change" in str(error.value)
    assert contents(half) == before


def test_another_share_starts_a_segment_and_keeps_every_place(half: Path) -> None:
    before = toyrun.meta(half)["clock"]
    with watched() as seen:
        run(half, "tasks.one.weight=1", "tasks.two.weight=3", "steps=20", allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    assert [s.start for s in schedule.segments] == [0, 8]
    assert schedule.segments[0] == Schedule.from_json(before["segments"]).segments[0]
    assert schedule.between(8, 20) == {"one": 3, "two": 9}
    for task, batch in BATCH.items():
        mine = _of(task, schedule.sequence(8, 20), seen.ids)
        assert mine == ids(task, before["positions"][task], len(mine))
        assert clock["positions"][task] == before["positions"][task] + len(mine)
        assert len(mine) == batch * schedule.between(8, 20)[task]
    lines = [x for x in deterministic(half) if (x["kind"], x["task"]) == ("train", "two")]
    assert [line["visit"] for line in lines] == list(range(4 - 1 + 9))


def test_a_batch_that_changes_keeps_the_place(half: Path) -> None:
    """Positions count examples: visits times the batch would read others again."""
    before = toyrun.meta(half)["clock"]
    with watched() as seen:
        run(half, "tasks.one.batch=4", allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    mine = _of("one", schedule.sequence(8, 12), seen.ids)
    assert mine == ids("one", before["positions"]["one"], len(mine)) and mine
    assert clock["positions"]["one"] == before["positions"]["one"] + len(mine)


def test_a_second_change_starts_a_third_segment(half: Path) -> None:
    run(half, "tasks.one.weight=1", "steps=16", allow_change=True)
    run(half, "tasks.one.weight=5", "steps=22", allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    assert [s.start for s in schedule.segments] == [0, 8, 16]
    assert schedule.between(16, 22) == {"one": 5, "two": 1}
    assert clock["positions"] == {t: n * BATCH[t] for t, n in schedule.visits(22).items()}


def test_a_task_that_is_added_leaves_the_others_where_they_stood(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, held = toyrun.meta(half)["clock"], toyrun.parameters(half)
    config = block()
    config["tasks"]["three"] = {**config["tasks"]["one"], "weight": 1}
    with watched() as seen:
        run(half, "steps=20", config=config, allow_change=True)
    clock = toyrun.meta(half)["clock"]
    schedule = Schedule.from_json(clock["segments"])
    assert schedule.between(8, 20) == {"one": 6, "two": 3, "three": 3}
    for task in ("one", "two"):
        mine = _of(task, schedule.sequence(8, 20), seen.ids)
        assert mine == ids(task, before["positions"][task], len(mine))
    new = _of("three", schedule.sequence(8, 20), seen.ids)
    assert new == ids("three", 0, 24) and clock["positions"]["three"] == 24
    after = toyrun.parameters(half)
    assert after.keys() - held.keys() == {"heads/three/out/bias", "heads/three/out/kernel"}
    words = "lacks parameters, which are initialised randomly (2): heads/three/out/bias, heads/three/out/kernel."
    assert words in capsys.readouterr().out


def test_what_a_checkpoint_holds_survives_an_added_task(half: Path) -> None:
    """A rate of zero leaves the parameters as they came: the saved ones, and fresh ones for the new head."""
    held = toyrun.parameters(half)
    config = block("optimizer.learning_rate=0.0")
    config["tasks"]["three"] = config["tasks"]["one"]
    run(half, config=config, allow_change=True)
    after = toyrun.parameters(half)
    assert held and all(np.array_equal(after[n], held[n]) for n in held)
    assert np.abs(after["heads/three/out/kernel"]).min() > 0


def test_a_task_that_is_removed_and_comes_back_goes_on_where_it_stood(half: Path) -> None:
    before = toyrun.meta(half)["clock"]
    less = block("steps=14")
    del less["tasks"]["two"]
    with watched() as seen:
        run(half, config=less, allow_change=True)
    alone = [i for batch in seen.ids for i in batch]
    assert alone == ids("one", before["positions"]["one"], 6 * 8)
    assert toyrun.meta(half)["clock"]["positions"]["two"] == before["positions"]["two"]
    assert not any(n.startswith("heads/two") for n in toyrun.parameters(half))
    with watched() as seen:
        run(half, "steps=20", allow_change=True)
    schedule = Schedule.from_json(toyrun.meta(half)["clock"]["segments"])
    mine = _of("two", schedule.sequence(14, 20), seen.ids)
    assert mine == ids("two", before["positions"]["two"], 32)
    more = _of("one", schedule.sequence(14, 20), seen.ids)
    assert more == ids("one", before["positions"]["one"] + 48, 32)


def test_a_tower_comes_and_goes_only_where_changes_are_allowed(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a modality that it reads. A rate of zero leaves all other parameters as they came."""
    held, config = toyrun.parameters(half), block("optimizer.learning_rate=0.0", "steps=10")
    layers = config["model"]["layers"]
    config["model"] = {"towers": {"trunk": config["model"], "ear": {"width": 4, "layers": layers}}}
    config["modalities"]["other"] = {"name": "toy", "tower": "ear"}
    before = contents(half)
    with pytest.raises(UserError, match=r"model.towers.ear \(schedule\): saved None, now") as error:
        run(half, config=config)
    assert "modalities.other (schedule)" in str(error.value) and contents(half) == before
    run(half, config=config, allow_change=True)
    assert "Config changed: model.towers.ear" in capsys.readouterr().out
    after = toyrun.parameters(half)
    assert held and all(np.array_equal(after[n], held[n]) for n in held)
    new = {n.rpartition("/")[0].split("/layers/")[0] for n in after.keys() - held.keys()}
    assert {n.split("/")[0] for n in new} == {"ear", "stems"}
    run(half, "optimizer.learning_rate=0.0", "steps=12", allow_change=True)
    assert "Config changed: model.towers.ear" in capsys.readouterr().out
    assert toyrun.parameters(half).keys() == held.keys()


def test_a_saved_phase_plan_goes_on_and_a_new_one_takes_over(half: Path) -> None:
    config = block("steps=24")
    config["schedule"] = {"phases": [{"start": 16, "weights": {"one": 0, "two": 1}}]}
    run(half, config=config, allow_change=True)
    schedule = Schedule.from_json(toyrun.meta(half)["clock"]["segments"])
    assert schedule.sequence(16, 24) == ["two"] * 8
    assert schedule.between(0, 16)["one"] > 8


def begun(workdir: Path, allow_change: bool = False) -> list[str]:
    """Return the lines that a run of the config with another head of task one logs as it begins in `workdir`."""
    lines: list[str] = []
    experiment = make_experiment(block("tasks.one.objective.head=other"))
    mesh = make_mesh(experiment.run.mesh, jax.devices()[:1])
    begin(experiment, epath.Path(workdir), mesh, allow_change, lines.append)
    return lines


def test_a_head_that_vanishes_and_one_that_is_new_are_named(half: Path) -> None:
    with pytest.raises(UserError, match=r"tasks\.one\.objective\.head.*now 'other'"):
        begun(half)
    assert begun(half, allow_change=True)[-2:] == [
        "Checkpoint 8 lacks parameters, which are initialised randomly (2): heads/other/out/bias, "
        "heads/other/out/kernel.",
        "Checkpoint 8 holds parameters that the config has no longer; later checkpoints lack them (2): "
        "heads/one/out/bias, heads/one/out/kernel.",
    ]


def test_a_parameter_that_vanishes_under_the_same_config_is_refused(half: Path) -> None:
    """As after a change of the code: here what was saved is of a head more than its config names."""
    with edited(half, 8) as meta:
        meta["config"]["tasks"]["one"]["objective"]["head"] = "two"
    before = contents(half)
    with pytest.raises(UserError, match=r"holds parameters .*heads/one/out/bias.*--allow_change"):
        run(half, "tasks.one.objective.head=two")
    assert contents(half) == before


def test_a_structural_change_is_refused_and_shown(half: Path) -> None:
    before = contents(half)
    with pytest.raises(UserError) as error:
        run(half, "model.width=16", "steps=20", allow_change=True)
    assert "model.width (structural): saved 8, now 16" in str(error.value)
    assert "steps" not in str(error.value).split("\n", 1)[1]
    assert "--workdir" in str(error.value)
    assert contents(half) == before


def test_what_a_run_began_with_is_kept_once_and_written_where_it_changes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that lies outside of the data: copied, never written where it lies, and loaded from the copy."""
    mine = tmp_path / "mine" / "tokenizer.model"
    mine.parent.mkdir()
    mine.write_bytes(bytes(range(256)))
    workdir = tmp_path / "run"
    # The modality that the tasks read, with the files of a text.
    files_of = lambda self: Text(folder=self.folder, tokenizer=str(mine)).files()  # noqa: E731
    toy = type(make_experiment(block()).modalities["toy"])
    monkeypatch.setattr(toy, "files", files_of)

    def marks() -> dict[str, tuple[int, int]]:
        files = [mine, workdir / "config.json", *(workdir / "assets").rglob("*.model")]
        return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}

    original = (mine.stat().st_ino, mine.stat().st_mtime_ns)
    run(workdir, "steps=4")
    assert (mine.stat().st_ino, mine.stat().st_mtime_ns) == original
    [kept] = (workdir / "assets").rglob("*.model")
    assert kept.read_bytes() == bytes(range(256)) and not kept.samefile(mine)
    before = marks()
    run(workdir, "steps=4")
    assert marks() == before
    run(workdir, "steps=8")
    assert json.loads((workdir / "config.json").read_text())["steps"] == 8
    changed = {name for name, mark in marks().items() if mark != before[name]}
    assert changed == {"config.json"}
    mine.unlink()
    experiment = make_experiment(toyrun.meta(workdir)["config"], str(workdir / "assets"))
    assert [str(p) for p in experiment.modalities["toy"].files().values()] == [str(kept)]


def test_a_config_that_is_refused_is_not_written(half: Path) -> None:
    before = (half / "config.json").read_bytes()
    with pytest.raises(UserError):
        run(half, "tasks.one.weight=3")
    assert (half / "config.json").read_bytes() == before
    run(half, "tasks.one.weight=3", allow_change=True)
    assert json.loads((half / "config.json").read_text())["tasks"]["one"]["weight"] == 3


def test_shapes_that_do_not_fit_are_named(copy: Path) -> None:
    """A checkpoint whose arrays are not what its own config makes, as after a change of the code."""
    with edited(copy, 12) as meta:
        meta["config"]["model"]["width"] = 16
    before = contents(copy)
    with pytest.raises(UserError) as error:
        run(copy, "model.width=16")
    said = str(error.value)
    assert "parameters/heads/one/out/kernel: expected float32[16, 1], found float32[8, 1]" in said
    assert str(copy / "checkpoints" / "12") in said
    assert contents(copy) == before


def _of(task: str, tasks: list[str], batches: list[list[int]]) -> list[int]:
    """Return the examples of one task, in order."""
    return [i for t, batch in zip(tasks, batches, strict=True) if t == task for i in batch]


def test_a_checkpoint_names_everything_a_run_is(straight: Path) -> None:
    meta = toyrun.meta(straight)
    assert meta["config"] == block()
    assert meta["clock"]["step"] == 12
    assert meta["clock"]["positions"] == {"one": 64, "two": 64}
    code = {f"code.{kind}/toy" for kind in ("blocks", "modalities", "objectives", "sources")}
    held_out = 'held-out {"count": 16, "name": "toy"}'
    sources = {"tasks.one.source", "tasks.two.source", held_out}
    assert set(meta["identities"]) == {*sources, *code}
    assert {"jax", "numpy", "mesh", "cores", "processor"} <= meta["environment"].keys()
    assert meta["environment"]["python"] == sys.version.split()[0]
    state = checkpoint.read_shapes(epath.Path(straight), 12)
    assert set(state) == {"parameters", "optimizer"}
