"""Shapes of a task: which visit takes which, what they may change, and that a run cut anywhere comes out the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
import toyrun
from etils import epath
from harness import deterministic
from hypothesis import given, settings
from hypothesis import strategies as st
from toyrun import block, run, watched

from mmjax.core.errors import UserError
from mmjax.dry_run import dry_run
from mmjax.experiment import Experiment, make_experiment
from mmjax.monitor import metrics
from mmjax.replay import replay
from mmjax.schedule.shapes import ShapeVariant, ShapeVariants

SHAPES: dict[str, Any] = {
    "small": {"inputs": {"toy": {"columns": 7}}, "weight": 2},
    "large": {"inputs": {"toy": {"columns": 9, "noise": 0.1}}},
}
LONG = ("steps=16", "limits.divergence=0", "checkpoint.keep=9")


def shaped(shapes: Any) -> str:
    return f"tasks.two.shapes={shapes!r}"


def experiment(*more: str, shapes: Any = SHAPES) -> Experiment:
    return make_experiment(block(shaped(shapes), *LONG, *more))


shares_of = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(shares_of, st.integers(0, 80), st.integers(0, 80))
def test_counts_are_those_of_a_walk_over_the_visits(
    shares: list[int], first: int, more: int
) -> None:
    task: Any = None
    each = ShapeVariants(
        tuple(ShapeVariant(f"p{i}", task, f"b{i}", s) for i, s in enumerate(shares))
    )
    walked = [each.at(visit).program for visit in range(first, first + more)]
    assert each.counts(first, first + more) == {f"p{i}": walked.count(f"p{i}") for i in range(len(shares))}  # fmt: skip
    begun = [each.at(visit).program for visit in range(more)]
    for i, share in enumerate(shares):  # never off by a whole visit
        for n in range(more + 1):
            assert abs(begun[:n].count(f"p{i}") - n * share / sum(shares)) < 1


def test_each_shape_is_a_program_and_equal_ones_are_one() -> None:
    made = experiment()
    assert set(made.phases.programs) == {"one", "two.small", "two.large"}
    shapes = {
        name: task.inputs["toy"].arrays()["rows"].shape
        for name, (task, _) in made.phases.programs.items()
    }
    assert shapes == {"one": (2, 6), "two.small": (3, 7), "two.large": (3, 9)}
    assert made.tasks["two"].inputs["toy"].arrays()["rows"].shape == (3, 6)  # evaluation's
    later = {"start": 8, "tasks": {"two": {"shapes": {"large": {"weight": 5}}}}}
    assert set(experiment(f"schedule.phases={[later]!r}").phases.programs) == {
        "one",
        "two.small",
        "two.large",
    }
    later = {"start": 8, "tasks": {"two": {"batch": 8}}}
    assert set(experiment(f"schedule.phases={[later]!r}").phases.programs) == {
        "one", "two.small", "two.large", "two.small@8", "two.large@8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"a": {"inputs": {"toy": {"tokens": 2}}}, "b": {}}, "shapes give different numbers of tokens.*a 2, b 3"),
        ({"a": {"weight": 0}}, "weight is 0; it must be at least 1"),
        ({"a": {"wieght": 2}}, "tasks.two.shapes.a.wieght.*Did you mean 'weight'"),
        ({"a": {"inputs": {"toy": {"colums": 7}}}}, "tasks.two.shapes.a.*Did you mean 'columns'"),
        ({"a": {"inputs": {"toys": {"columns": 7}}}}, "tasks.two.shapes.a.*Did you mean 'toy'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_shape_is_said(shapes: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        experiment(shapes=shapes)


# --- in a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, ...]]]:
    workdir = tmp_path_factory.mktemp("shapes") / "run"
    with watched() as seen:
        run(workdir, shaped(SHAPES), *LONG)
    return workdir, seen.shapes


def test_visits_take_the_shapes_in_turn(finished: tuple[Path, list[tuple[int, ...]]]) -> None:
    workdir, shapes = finished
    lines = [x for x in deterministic(workdir) if x["kind"] == "train"]
    variants = experiment().phases.at(0).variants["two"]
    taken = []
    for line, shape in zip(lines, shapes, strict=True):
        if line["task"] == "two":
            name = variants.at(line["visit"]).shape
            assert line["bucket"] == name and shape[1:] == (3, 7 if name == "small" else 9)
            taken.append(name)
        else:
            assert "bucket" not in line
    assert len(taken) >= 5 and taken.count("small") >= 2 * taken.count("large") - 1 > 0


@pytest.mark.parametrize("step", [3, 7, 10])
def test_stopped_between_shapes_it_ends_in_the_same_bits(
    finished: tuple[Path, Any], tmp_path: Path, step: int
) -> None:
    run(tmp_path, shaped(SHAPES), *LONG, f"steps={step}")
    run(tmp_path, shaped(SHAPES), *LONG)
    assert toyrun.bits(tmp_path) == toyrun.bits(finished[0])


def test_a_visit_of_a_shape_is_replayed(finished: tuple[Path, Any]) -> None:
    for name in SHAPES:
        lines = [x for x in deterministic(finished[0]) if x.get("bucket") == name]
        found = replay(epath.Path(finished[0]), "two", lines[-1]["visit"], jax.devices()[:1])
        assert found.is_same and found.step == lines[-1]["step"]


def test_a_dry_run_has_a_row_for_each(
    finished: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(block(shaped(SHAPES), *LONG), epath.Path(tmp_path), False)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1] for line in lines if line.startswith("two.")}
    counts = experiment().phases.visits(experiment().planned.schedule(), 0, 16)
    assert rows == {n: str(c) for n, c in counts.items() if n != "one"} and len(rows) == 2


def test_a_budget_takes_the_mean_over_shapes(tmp_path: Path) -> None:
    from mmjax.training.rebalance import Budget

    made = experiment("schedule.rule='budget'", "schedule.rebalance_every=8")
    times = {"one": 1.0, "two.small": 2.0, "two.large": 5.0}
    folder = epath.Path(tmp_path)
    writer = metrics.MetricWriter(folder, 0)
    variants = made.phases.at(0).variants["two"]
    for step in range(6):
        program = variants.at(step).program
        writer.write(2 * step, "two", {"visit": step}, {"seconds": times[program]})
        writer.write(2 * step + 1, "one", {"visit": step}, {"seconds": 1.0})
    writer.close()
    assert Budget(made, folder)._seconds(12) == {"one": 1.0, "two": (2 * 2.0 + 5.0) / 3}
    flops = made.flops
    assert made.planned.flops_at(0)["two"] == (2 * flops["two.small"] + flops["two.large"]) / 3


def test_shapes_may_change_from_a_step_on_with_leave(tmp_path: Path) -> None:
    run(tmp_path, *LONG, "steps=6")
    with pytest.raises(UserError, match="--allow_change"):
        run(tmp_path, shaped(SHAPES), *LONG)
    run(tmp_path, shaped(SHAPES), *LONG, allow_change=True)
    lines = [x for x in deterministic(tmp_path) if x["kind"] == "train" and x["task"] == "two"]
    assert all(("bucket" in x) == (x["step"] >= 6) for x in lines)
    assert [x["visit"] for x in lines] == list(range(len(lines)))
