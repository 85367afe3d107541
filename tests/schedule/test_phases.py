"""Phases that change shapes, frozen parts and the learning rate: where, for what, and across restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from harness import deterministic
from hypothesis import given, settings
from hypothesis import strategies as st
from toyrun import block, meta_of, parameters_of, run, watched

from mmjax import train as trainer
from mmjax.core.errors import UserError
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.data import order
from mmjax.dry_run import dry_run
from mmjax.engine.compile import LimitsConfig, compile_all
from mmjax.engine.requests import train_requests
from mmjax.experiment import Experiment, make_experiment
from mmjax.replay import replay
from mmjax.schedule.phase_specs import from_config
from mmjax.schedule.phases import Phase, Phases
from mmjax.schedule.shapes import ShapeVariant, ShapeVariants

STEM = "stems/toy/embed/kernel"
PHASES: list[dict[str, Any]] = [
    {"start": 4, "tasks": {"two": {"batch": 8, "inputs": {"toy": {"tokens": 2}}}}},
    {"start": 8, "rules": [{"match": "stems/.*", "freeze": True}], "learning_rate": 0.5},
    {"start": 12, "tasks": {"two": {"batch": 16, "inputs": {"toy": {"tokens": 3}}}}, "rules": []},
]
LONG = ("steps=16", "limits.divergence=0", "checkpoint.keep=9", "optimizer.weight_decay=0.0")


def phased(*phases: dict[str, Any]) -> str:
    return f"schedule.phases={json.loads(json.dumps(list(phases)))!r}".replace("true", "True")


def experiment(*phases: dict[str, Any], more: tuple[str, ...] = ()) -> Experiment:
    return make_experiment(block(phased(*phases), *LONG, *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, toyrun.Seen]:
    workdir = tmp_path_factory.mktemp("phases") / "run"
    with watched() as seen:
        run(workdir, phased(*PHASES), *LONG)
    return workdir, seen


# --- what holds when ---------------------------------------------------------------------------


def test_what_a_phase_does_not_say_stays_as_it_was() -> None:
    made = experiment(*PHASES).phases
    batches = [made.at(step).tasks["two"].batch for step in (0, 3, 4, 11, 12, 99)]
    assert batches == [16, 16, 8, 8, 16, 16]
    assert [made.at(step).scale for step in (0, 7, 8, 99)] == [1.0, 1.0, 0.5, 0.5]
    frozen = [[rule.match for rule in made.at(step).rules] for step in (0, 4, 8, 12)]
    assert frozen == [[], [], ["stems/.*"], []]


def test_the_same_settings_are_one_program() -> None:
    made = experiment(*PHASES).phases
    programs = [
        {task: variants.at(0).program for task, variants in phase.variants.items()}
        for phase in made.entries
    ]
    assert programs == [
        {"one": "one", "two": "two"},
        {"one": "one", "two": "two@4"},
        {"one": "one@8", "two": "two@8"},  # what is frozen is part of a program
        {"one": "one", "two": "two"},
    ]
    assert set(made.programs) == {"one", "two", "two@4", "one@8", "two@8"}


def test_a_rate_alone_makes_no_program() -> None:
    made = experiment({"start": 4, "learning_rate": 0.1}).phases
    assert set(made.programs) == {"one", "two"}
    assert [made.at(step).scale for step in (0, 3, 4, 99)] == [1.0, 1.0, 0.1, 0.1]


def test_all_programs_count_and_fit_before_the_first_step() -> None:
    made = experiment(*PHASES)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    requests = train_requests(made, mesh)
    with pytest.raises(UserError, match="makes 5 programs.*two@4"):
        compile_all(requests, mesh, LimitsConfig(programs=4))
    tiny = {name: requests[name] for name in ("two", "two@4")}
    with pytest.raises(UserError, match="two@4: "):
        compile_all(tiny, mesh, LimitsConfig(memory_gib=1e-9))
    flops = made.flops
    # A row of three tokens, and one of two: the head's products (8 to 1, three of them) are per row.
    head = 3 * 2 * 8
    assert (flops["two"] / 16 - head) / 3 == (flops["two@4"] / 8 - head) / 2
    # What is frozen costs no gradient.
    assert flops["one@8"] < flops["one"]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_positions_go_on_without_gap_or_repeat_whatever_the_batches(data: st.DataObject) -> None:
    """Consumed examples against a walk over the steps."""
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 60), max_size=4)))]
    sizes = [data.draw(st.integers(1, 9)) for _ in starts]
    weights = {"a": data.draw(st.integers(1, 4)), "b": data.draw(st.integers(1, 4))}
    schedule = from_config("random", weights, data.draw(st.integers(0, 99)))
    first, last = sorted(data.draw(st.tuples(st.integers(0, 80), st.integers(0, 80))))

    class Sized:
        def __init__(self, batch: int):
            self.batch = batch

    each = []
    for start, size in zip(starts, sizes, strict=True):
        tasks: Any = {"a": Sized(size), "b": Sized(1)}
        each.append(
            Phase(start, tasks, {n: ShapeVariants((ShapeVariant(n, t),)) for n, t in tasks.items()})
        )
    made = Phases(tuple(each))
    walked = 0
    for step in range(first, last):
        held = max(i for i, start in enumerate(starts) if start <= step)
        walked += sizes[held] * (schedule.task(step) == "a")
    assert made.consumed(schedule, "a", first, last) == walked
    assert made.visits(schedule, first, last) == {
        task: n for task, n in schedule.between(first, last).items() if n
    }


# --- in a run ----------------------------------------------------------------------------------


def test_batches_have_the_shapes_of_their_phase_and_examples_their_order(
    finished: tuple[Path, toyrun.Seen],
) -> None:
    workdir, seen = finished
    lines = [x for x in deterministic(workdir) if x["kind"] == "train"]
    two = [len(ids) for ids, line in zip(seen.ids, lines, strict=True) if line["task"] == "two"]
    steps = [line["step"] for line in lines if line["task"] == "two"]
    assert two == [8 if 4 <= step < 12 else 16 for step in steps] and len(set(two)) == 2
    for task in ("one", "two"):
        read = [
            i
            for ids, line in zip(seen.ids, lines, strict=True)
            if line["task"] == task
            for i in ids
        ]
        assert read == order.example_ids(toyrun.SEED, task, 0, len(read), 40).tolist()
        assert meta_of(workdir, 16)["clock"]["positions"][task] == len(read)
    tokens = {line["step"]: line["tokens"] for line in lines if line["task"] == "two"}
    assert all(n == (8 * 2 if 4 <= step < 12 else 16 * 3) for step, n in tokens.items())


def test_frozen_parts_stay_to_the_bit_while_the_phase_lasts(
    finished: tuple[Path, toyrun.Seen],
) -> None:
    workdir, _ = finished
    at = {step: parameters_of(workdir, step) for step in (4, 8, 12, 16)}
    np.testing.assert_array_equal(at[8][STEM], at[12][STEM])
    assert (at[4][STEM] != at[8][STEM]).any() and (at[12][STEM] != at[16][STEM]).any()
    assert (at[8]["heads/one/out/kernel"] != at[12]["heads/one/out/kernel"]).any()


def test_the_rate_is_scaled_from_the_phase_on(finished: tuple[Path, toyrun.Seen]) -> None:
    lines = [x for x in deterministic(finished[0]) if x["kind"] == "train"]
    told = {line["step"]: line["learning_rate"] for line in lines}
    expected = {step: 0.01 * (0.5 if step >= 8 else 1.0) for step in range(2, 16)}
    assert {step: told[step] for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("step", [6, 8, 11])
def test_stopped_within_a_phase_it_ends_in_the_same_bits(
    finished: tuple[Path, toyrun.Seen], tmp_path: Path, step: int
) -> None:
    run(tmp_path, phased(*PHASES), *LONG, f"steps={step}")
    run(tmp_path, phased(*PHASES), *LONG)
    assert toyrun.bits(tmp_path) == toyrun.bits(finished[0])


def test_a_visit_of_a_later_phase_is_replayed(finished: tuple[Path, toyrun.Seen]) -> None:
    lines = [x for x in deterministic(finished[0]) if x["kind"] == "train"]
    visits = {(x["task"], x["step"]): x["visit"] for x in lines}
    task, step = next(key for key in visits if key[0] == "two" and 8 <= key[1] < 12)
    found = replay(epath.Path(finished[0]), task, visits[task, step], jax.devices()[:1])
    assert found.is_same and found.step == step


def test_what_is_thawed_has_optimizer_state_from_the_start(tmp_path: Path) -> None:
    """Frozen first and trained later: the tree of the state does not change."""
    frozen = f"optimizer.rules={[{'match': 'stems/.*', 'freeze': True}]!r}"
    thaw = {"start": 4, "rules": [{"match": "stems/.*", "freeze": False}]}
    run(tmp_path, phased(thaw), *LONG, frozen, "steps=8")
    first, last = parameters_of(tmp_path, 4), parameters_of(tmp_path, 8)
    fresh = jax.jit(make_experiment(block(*LONG)).declaration.initialise)(toyrun.SEED)
    np.testing.assert_array_equal(first[STEM], fresh[STEM])
    assert (first[STEM] != last[STEM]).any()


@pytest.mark.parametrize("view", ["own_clock", "own_moments"])
def test_views_keep_to_what_the_phase_moves(tmp_path: Path, view: str) -> None:
    run(tmp_path, phased(*PHASES), *LONG, f"optimizer.update_scope={view}")
    at = {step: parameters_of(tmp_path, step) for step in (8, 12, 16)}
    np.testing.assert_array_equal(at[8][STEM], at[12][STEM])
    assert (at[12][STEM] != at[16][STEM]).any()


def test_programs_that_lie_behind_are_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    compiled = trainer.compile_all

    def noted(requests: Any, *rest: Any) -> Any:
        asked.append({name for name in requests if "/" not in name})
        return compiled(requests, *rest)

    monkeypatch.setattr(trainer, "compile_all", noted)
    run(tmp_path, phased(*PHASES), *LONG, "steps=12")
    run(tmp_path, phased(*PHASES), *LONG)
    assert asked == [{"one", "two", "two@4", "one@8", "two@8"}, {"one", "two"}]


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"tasks": {"tow": {"batch": 4}}}, r"phases\[0\].tasks': no task 'tow'.*'two'"),
        (
            {"tasks": {"two": {"objective": {}}}},
            "two.objective'.*batch, inputs, microbatches, shapes",
        ),
        ({"tasks": {"two": {"bach": 4}}}, "two.bach'.*'batch'"),
        ({"tasks": {"two": {"batch": 0}}}, r"phases\[0\].tasks.two.batch is 0"),
        ({"tasks": {"two": {"inputs": {"toy": {"token": 2}}}}}, r"phases\[0\].*token'.*'tokens'"),
        ({"tasks": 3}, r"phases\[0\].tasks' is 3; expected a block of keys"),
        ({"rules": [{"match": "stem/.*", "freeze": True}]}, "matches the whole of no parameter"),
        ({"rules": [{"mach": ".*"}]}, r"phases\[0\].*mach'.*'match'"),
        ({"learning_rate": "low"}, r"phases\[0\].learning_rate' is 'low'"),
        ({"learning_rates": 1.0}, r"phases\[0\].learning_rates'.*'learning_rate'"),
    ],
)
def test_phases_that_cannot_be(phase: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        experiment({"start": 4, **phase})


def test_a_dry_run_counts_each_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(block(phased(*PHASES), *LONG), epath.Path(tmp_path), allow_change=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = {row[0]: int(row[1]) for row in rows if row and row[0] in ("one@8", "two@4", "two@8")}
    tasks = experiment(*PHASES).planned.schedule().sequence(0, 16)
    assert steps == {
        "one@8": tasks[8:12].count("one"),
        "two@4": tasks[4:8].count("two"),
        "two@8": tasks[8:12].count("two"),
    }


def test_a_budget_knows_what_a_step_costs_in_its_phase() -> None:
    made = experiment(PHASES[0], more=("schedule.rule='budget'", "tasks.one.weight=1"))
    first, second = made.planned.schedule().segments
    cost = made.flops
    for segment, two in ((first, "two"), (second, "two@4")):
        spent = segment.weights["one"] * cost["one"] / (segment.weights["two"] * cost[two])
        assert spent == pytest.approx(1.0, rel=0.01)
    assert first.weights != second.weights
