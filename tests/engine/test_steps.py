"""Check what a step does and leaves undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from harness import deterministic, log
from toyrun import Parts, host, parts, run, watched

from mmjax.core.errors import UserError
from mmjax.data import order
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.requests import train_requests


def _equal(one: Any, two: Any) -> bool:
    """Return whether two trees of arrays hold the same bits (NaN equals NaN)."""
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), one, two)
    return all(jax.tree.leaves(same))


def _stepped(toy: Parts, task: str, ids: Any, step: int = 3) -> tuple[Any, Any]:
    """Return state and metrics after one step of a task on a copy of the initial state."""
    request = train_requests(toy.experiment, toy.mesh)[task]
    call = compile_all({task: request}, toy.mesh, LimitsConfig())[task].call
    copied = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), toy.state)
    batch = toy.batch(task, ids)
    state, metrics = call(copied, batch, toy.ticks(task, step, 2))
    assert all(x.is_deleted() for x in jax.tree.leaves(copied.parameters))  # donated
    return host(state), host(metrics)


@pytest.mark.parametrize("kind", ["bad_loss", "bad_gradient"])
def test_a_non_finite_step_leaves_every_bit_as_it_was(kind: str) -> None:
    toy = parts(f"tasks.one.objective.{kind}=(13,)", "optimizer.ema=0.9")
    before = host(toy.state)
    assert before.buffers and before.optimizer
    after, metrics = _stepped(toy, "one", [13, *range(7)])
    assert not metrics["finite"]
    # Either alone is enough.
    assert np.isfinite(metrics["loss"]) == (kind == "bad_gradient")
    assert np.isfinite(metrics["grad_norm"]) == (kind == "bad_loss")
    assert _equal(after, before)
    # The control: without that example all three parts move.
    after, metrics = _stepped(toy, "one", range(8))
    assert metrics["finite"]
    for part in ("parameters", "optimizer", "buffers"):
        assert not _equal(getattr(after, part), getattr(before, part))


def test_a_batch_without_a_valid_row_leaves_every_bit_as_it_was() -> None:
    """It decays no weight and spends no momentum; it is not a step that failed either."""
    toy = parts("optimizer.ema=0.9")
    before = host(toy.state)
    after, metrics = _stepped(toy, "one", [])
    assert metrics["finite"] and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert _equal(after, before)


def test_an_invalid_row_reaches_neither_loss_nor_gradient() -> None:
    """Five examples and three blank rows are worth as much as a batch of five."""
    bare = ("tasks.one.objective.hidden=0.0",)
    _, blank = _stepped(parts(*bare), "one", range(5))
    _, small = _stepped(parts(*bare, "tasks.one.batch=5"), "one", range(5))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(blank[name], small[name], rtol=1e-5)
    _, whole = _stepped(parts(*bare), "one", range(8))
    assert abs(whole["loss"] - small["loss"]) > 1e-3


def test_the_state_keeps_its_shardings() -> None:
    """Else the next call would compile again."""
    toy = parts("mesh.fsdp=2", "mesh.tensor=2", devices=8)
    abstract = toy.experiment.abstract_state(toy.mesh)
    state = toy.state
    programs = compile_all(train_requests(toy.experiment, toy.mesh), toy.mesh, LimitsConfig())
    for task in ("one", "two", "one"):
        batch = toy.batch(task, range(8))
        state, _ = programs[task].call(state, batch, toy.ticks(task, 1, 1))
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
        assert all(x.sharding == a.sharding for x, a in pairs)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


# --- a run with non-finite steps ---------------------------------------------------------------


def _events(workdir: Path, name: str) -> list[str]:
    return [x["text"] for x in log(workdir) if x["line"] == "event" and x["name"] == name]


def test_a_non_finite_step_is_counted_and_names_its_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    with watched() as seen:
        run(workdir, "tasks.one.objective.bad_loss=(13,)", "checkpoint.every=5")
    tasks = [x["task"] for x in deterministic(workdir) if x["kind"] == "train"]
    steps = zip(range(12), tasks, seen.ids, strict=True)
    bad = {step: ids for step, task, ids in steps if task == "one" and 13 in ids}
    assert 0 < len(bad) < 8
    assert toyrun.meta(workdir)["clock"]["skipped"] == {"one": len(bad), "two": 0}
    events = _events(workdir, "non-finite")
    assert events == [
        f"step {step}, task one: no update; examples {', '.join(map(str, ids))}"
        for step, ids in bad.items()
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"non-finite: {event}" in printed for event in events)
    lines = {x["step"]: x for x in deterministic(workdir) if x["kind"] == "train"}
    assert {s for s, x in lines.items() if x["loss"] == "nan"} == set(bad)


@pytest.mark.parametrize(("number", "word"), [(np.nan, "NaN"), (-np.inf, "an infinite number")])
def test_a_non_finite_input_is_named_with_its_array_and_example(
    tmp_path: Path, number: float, word: str
) -> None:
    ids = [int(i) for i in order.example_ids(toyrun.SEED, "one", 0, 8, 40)]
    values = np.ones((40, 4, 6), np.float32)
    values[ids[3], 1, 2] = number
    np.save(tmp_path / "values.npy", values)
    run(tmp_path / "run", f"tasks.one.source.file='{tmp_path}/values.npy'", "steps=2")
    assert _events(tmp_path / "run", "non-finite") == [
        f"step 0, task one: no update; examples {', '.join(map(str, ids))}; "
        f"inputs.toy.rows of example {ids[3]} holds {word}"
    ]


def test_non_finite_steps_of_the_only_task_end_the_run(tmp_path: Path) -> None:
    """With others beside it, it is excluded: see `tests/training/test_guards_quarantine.py`."""
    with pytest.raises(UserError) as error:
        run(
            tmp_path / "run",
            f"tasks.one.objective.bad_gradient={tuple(range(40))}",
            "tasks.two.weight=0",
            "limits.max_non_finite_steps=3",
            "log.flush_every=1",
        )
    said = str(error.value)
    assert "Task 'one': 3 steps in a row" in said and "up to step 2" in said
    assert "optimizer.learning_rate" in said


def test_non_finite_steps_that_are_not_in_a_row_are_no_reason(tmp_path: Path) -> None:
    """Example 13 comes once in 5 visits: at most twice in a row, where two epochs meet."""
    run(
        tmp_path / "run",
        "steps=24",
        "tasks.one.objective.bad_loss=(13,)",
        "limits.max_non_finite_steps=3",
    )
    assert toyrun.meta(tmp_path / "run")["clock"]["skipped"]["one"] >= 3


def test_a_rate_that_is_too_high_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no task has had a finite loss and gradient.*learning_rate"
    ):
        run(
            tmp_path / "run",
            "optimizer.learning_rate=1e30",
            "limits.max_non_finite_steps=2",
            "steps=30",
        )
    skipped = _events(tmp_path / "run", "non-finite")
    assert len(skipped) >= 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 30
