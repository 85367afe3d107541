"""Weights & Biases: a stand-in module notes its calls; nothing asks for it unasked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import deterministic
from toyrun import run

from mmjax.core.errors import UserError


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def define_metric(self, name: str, **settings: Any) -> None:
        self.metrics.append((name, settings))

    def log(self, values: dict[str, float]) -> None:
        assert not self.finished
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Return the runs that the stand-in began."""
    result: list[FakeRun] = []
    module = ModuleType("wandb")

    def init(**settings: Any) -> FakeRun:
        result.append(FakeRun(**settings))
        return result[-1]

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return result


def test_it_gets_what_tensorboard_gets(tmp_path: Path, runs: list[FakeRun]) -> None:
    run(tmp_path / "run", "log.wandb=toys")
    [made] = runs
    assert made.finished == 1
    assert (made.settings["project"], made.settings["resume"]) == ("toys", "allow")
    assert made.settings["config"]["log"]["wandb"] == "toys"
    assert ("*", {"step_metric": "step"}) in made.metrics
    lines = deterministic(tmp_path / "run")
    losses = {(x["step"], x["task"]): x["loss"] for x in lines if x["kind"] == "train"}
    told = {
        (values["step"], name.removesuffix("/loss")): value
        for values in made.logged
        for name, value in values.items()
        if name in ("one/loss", "two/loss")
    }
    assert told == losses and len(told) == 12
    names = {name for values in made.logged for name in values}
    assert {"timing/one/seconds", "eval/two/toy/held-out loss", "run/goodput"} <= names


def test_the_same_workdir_is_the_same_run(tmp_path: Path, runs: list[FakeRun]) -> None:
    run(tmp_path / "one", "log.wandb=toys", "steps=2")
    run(tmp_path / "one", "log.wandb=toys", "steps=4")
    run(tmp_path / "two", "log.wandb=toys", "steps=1")
    first, again, other = (made.settings["id"] for made in runs)
    assert first == again != other
    assert min(values["step"] for values in runs[1].logged) == 2


def test_it_is_not_asked_for_unasked(tmp_path: Path, runs: list[FakeRun]) -> None:
    run(tmp_path / "run", "steps=1")
    assert not runs


def test_a_missing_package_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="log.wandb is 'toys'.*not installed.*pip install wandb"):
        run(tmp_path / "run", "log.wandb=toys")
    assert not list((tmp_path / "run").iterdir())
