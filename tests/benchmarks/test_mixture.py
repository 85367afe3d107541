"""The experiment of mixture and single tasks: what it runs, how it sums up, and that it resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import toyrun
from mains import run as run_main

from benchmarks.experiments import mixture

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "tests" / "configs" / "toy.py")
EXTRA = f"--extra={ROOT / 'tests' / 'extra'}"


def test_a_task_alone_has_the_visits_of_the_mixture() -> None:
    block = toyrun.block("steps=30")  # shares 2 and 1, a warm-up of 2 in 30
    alone = mixture.singles(block, seed=5)
    assert alone["one"] == (
        "seed=5", "steps=20", "optimizer.warmup=1", "tasks.two.weight=0", "tasks.two.evaluators={}",
    )  # fmt: skip
    assert alone["two"][:3] == ("seed=5", "steps=10", "optimizer.warmup=1")


def test_mixtures_come_first_then_each_task_of_each_seed() -> None:
    block = toyrun.block()
    names = [trial.name for trial in mixture.trials(block, [3, 4], alone=True)]
    assert names == [
        "mixture-seed3", "mixture-seed4", "one-seed3", "two-seed3", "one-seed4", "two-seed4",
    ]  # fmt: skip
    assert [t.name for t in mixture.trials(block, [3], alone=False)] == ["mixture-seed3"]


def test_mean_and_standard_deviation_over_seeds() -> None:
    def record(value: float) -> dict:
        return {"task": "a", "split": "test", "name": "R@1", "value": value, "chance": 0.01}

    other = record(0.9) | {"task": "b"}
    found = {
        mixture.Trial(0, "mixture", ()): [record(0.1), other],
        mixture.Trial(1, "mixture", ()): [record(0.3), other],
        mixture.Trial(0, "a", ()): [
            record(0.5),
            other,
        ],  # another task's is not a result of this run
    }
    a, b = mixture.summarise(found)
    assert a["mixture"] == {0: 0.1, 1: 0.3} and a["alone"] == {0: 0.5}
    assert b["alone"] == {}
    page = mixture.markdown([a, b], "command")
    assert "| a | R@1 | test | 20.0 ± 14.1 | 50.0 ± 0.0 | 1 |" in page
    assert "| b | R@1 | test | 90.0 ± 0.0 | - | 1 |" in page


def test_losses_are_no_percentages() -> None:
    assert mixture.shown({0: 0.5, 1: 0.7}, "loss") == "0.600 ± 0.141"


def test_seeds_that_are_no_numbers() -> None:
    ended = run_main(lambda _: mixture.main(["--config=x.py", "--out=x", "--seeds=a"]))
    assert ended.status == 2 and "--seeds=a: write integers" in ended.err


def test_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    words = [f"--config={TOY}", EXTRA, f"--out={tmp_path}", "--seeds=0", "--alone"]
    words += ["--config.steps=6", "--config.evaluation.every=0"]
    ended = run_main(lambda _: mixture.main(words))
    assert ended.status == 0, ended.err
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["task"], set(row["mixture"]), set(row["alone"])) for row in rows] == [
        ("one", {"0"}, {"0"}), ("two", {"0"}, {"0"}),
    ]  # fmt: skip
    assert "| one | held-out loss |" in (tmp_path / "results.md").read_text()
    again = run_main(lambda _: mixture.main([word for word in words if word != "--alone"]))
    assert again.status == 0
    assert [row["mixture"] for row in json.loads((tmp_path / "results.json").read_text())] == [
        row["mixture"] for row in rows
    ]
    assert "Done: " in (tmp_path / "mixture-seed0.log").read_text()


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    words = [
        f"--config={TOY}",
        EXTRA,
        f"--out={tmp_path}",
        "--seeds=0",
        "--config.limits.programs=1",
    ]
    ended = run_main(lambda _: mixture.main(words))
    assert ended.status == 2 and "mixture-seed0 ended with status 2; see " in ended.err
