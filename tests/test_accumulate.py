"""One update of several steps: the gradient of the tasks' losses, summed by their shares."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import toyrun

from mmjax.core.errors import UserError
from mmjax.engine import checkpoint
from mmjax.engine.state import EMA, SUM, SUMMED, State, state_from_canonical, state_to_canonical
from mmjax.engine.steps import ModelSpec, loss_function, train_function
from mmjax.experiment import Experiment
from mmjax.optim.optimizer import Optimizer

WORDS = ("optimizer.accumulate=3", "dtype.parameters=float64", "dtype.compute=float64")
ORDER = ("one", "two", "one")  # by the shares 2 and 1


pytestmark = pytest.mark.usefixtures("x64")


def ticks(step: int, last: bool = False) -> dict[str, Any]:
    visit = sum(t == ORDER[step] for t in ORDER[:step])
    return {"step": np.int32(step), "visit": np.int32(visit), "last": np.int32(last)}


def spec(experiment: Experiment) -> ModelSpec:
    return ModelSpec(experiment.declaration, np.float64, np.float64, 0)


def step(
    parts: toyrun.Parts, state: State, number: int, batch: Any, last: bool = False
) -> tuple[State, Any]:
    return program(parts, ORDER[number])(state, batch, ticks(number, last))


_PROGRAMS: dict[tuple[int, str], tuple[toyrun.Parts, Any]] = {}


def program(parts: toyrun.Parts, name: str) -> Any:
    """The training program of a task, one for all tests that share the parts."""
    if (id(parts), name) not in _PROGRAMS:
        experiment = parts.experiment
        task, optimizer = experiment.tasks[name], experiment.optimizers.whole
        function = jax.jit(train_function(spec(experiment), task, optimizer))
        _PROGRAMS[id(parts), name] = parts, function
    return _PROGRAMS[id(parts), name][1]


def batches(parts: toyrun.Parts) -> list[Any]:
    starts = (0, 0, 8)
    sizes = [parts.experiment.tasks[name].batch for name in ORDER]
    return [parts.batch(t, range(s, s + n)) for t, s, n in zip(ORDER, starts, sizes, strict=True)]


def gradient(parts: toyrun.Parts, number: int, batch: Any) -> dict[str, np.ndarray]:
    experiment = parts.experiment
    loss_of = loss_function(spec(experiment), experiment.tasks[ORDER[number]])
    visit = ticks(number)["visit"]
    function = jax.jit(jax.grad(lambda p: loss_of(p, {}, batch, visit).value))
    return toyrun.host(function(parts.state.parameters))


@dataclass(frozen=True)
class Round:
    """Three steps that make a round, without a limit of the gradient's norm.

    Attributes:
      batches, gradients: by step.
    """

    parts: toyrun.Parts
    batches: list[Any]
    gradients: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def unclipped() -> Round:
    with jax.enable_x64(True):
        parts = toyrun.parts(*WORDS, "optimizer.clip=0.0")
        made = batches(parts)
        return Round(parts, made, [gradient(parts, i, batch) for i, batch in enumerate(made)])


def test_a_round_is_one_step_on_the_mean_of_its_gradients(unclipped: Round) -> None:
    """Against AdamW in NumPy, its first step: `m / (sqrt(v) + eps)` is `g / (|g| + eps)`."""
    parts, grads = unclipped.parts, unclipped.gradients
    before, state = toyrun.host(parts.state.parameters), parts.state
    for number, batch in enumerate(unclipped.batches):
        for name in before:  # nothing moves within a round
            np.testing.assert_array_equal(state.parameters[name], before[name])
        state, told = step(parts, state, number, batch)
        assert bool(told["finite"])
    config, optimizer = parts.experiment.run.optimizer, parts.experiment.optimizers.whole
    eps = config.algorithm.eps
    rate = float(optimizer.rate("one", ticks(2)))
    for name, old in before.items():
        mean = sum(g[name] for g in grads) / 3
        direction = mean / (np.abs(mean) + eps)
        decay = config.weight_decay * parts.experiment.declaration.specs[name].decay
        expected = old - rate * (direction + decay * old)
        np.testing.assert_allclose(state.parameters[name], expected, rtol=1e-10, atol=1e-12)
        assert np.abs(expected - old).max() > 0
        np.testing.assert_array_equal(state.buffers[SUM + name], np.zeros_like(old))
    assert {int(np.max(leaf["count"])) for leaf in state.optimizer.values()} == {1}


def expected_of(parts: toyrun.Parts, before: Any, mean: Any, number: int) -> np.ndarray:
    """AdamW's first step in NumPy, from the mean gradient of a parameter."""
    config, [(name, old)] = parts.experiment.run.optimizer, before.items()
    rate = float(parts.experiment.optimizers.whole.rate("one", ticks(number)))
    decay = config.weight_decay * parts.experiment.declaration.specs[name].decay
    return np.asarray(old - rate * (mean / (np.abs(mean) + config.algorithm.eps) + decay * old))


@pytest.mark.parametrize("bad", [0, 2], ids=["within a round", "at its end"])
@pytest.mark.parametrize("how", ["not finite", "no valid row"])
def test_the_mean_is_over_the_steps_that_are_there(unclipped: Round, bad: int, how: str) -> None:
    parts, grads, state = unclipped.parts, unclipped.gradients, unclipped.parts.state
    before = toyrun.host(parts.state.parameters)
    for number, batch in enumerate(unclipped.batches):
        if number == bad and how == "not finite":
            batch = jax.tree.map(lambda x: x * np.nan if x.dtype.kind == "f" else x, batch)
        elif number == bad:
            batch = replace(batch, valid=np.zeros_like(batch.valid))
        state, told = step(parts, state, number, batch)
        assert bool(told["finite"]) == (number != bad or how == "no valid row")
    name = next(iter(before))
    mean = sum(g[name] for i, g in enumerate(grads) if i != bad) / 2
    expected = expected_of(parts, {name: before[name]}, mean, 2)
    np.testing.assert_allclose(state.parameters[name], expected, rtol=1e-10, atol=1e-12)


def test_a_round_of_bad_steps_moves_nothing() -> None:
    parts = toyrun.parts(*WORDS)
    state, before = parts.state, toyrun.host(parts.state)
    for number, batch in enumerate(batches(parts)):
        bad = jax.tree.map(lambda x: x * np.nan if x.dtype.kind == "f" else x, batch)
        state, _ = step(parts, state, number, bad)
    jax.tree.map(np.testing.assert_array_equal, toyrun.host(state), before)


def test_the_round_that_the_end_of_the_run_cuts_short_is_applied(unclipped: Round) -> None:
    """Of a run of two steps where three make a round: the mean of the two."""
    parts, grads, state = unclipped.parts, unclipped.gradients, unclipped.parts.state
    before = toyrun.host(parts.state.parameters)
    for number, batch in enumerate(unclipped.batches[:2]):
        state, _ = step(parts, state, number, batch, last=number == 1)
    for name, old in before.items():
        expected = expected_of(parts, {name: old}, (grads[0][name] + grads[1][name]) / 2, 1)
        np.testing.assert_allclose(state.parameters[name], expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(state.buffers[SUM + name], np.zeros_like(old))
    assert int(state.buffers[SUMMED]) == 0


class Ordered(frozenset[str]):
    """A set that comes in the order of its names, or backwards."""

    backwards = False

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__(), reverse=self.backwards))


def test_the_program_does_not_depend_on_the_order_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process hashes strings by a seed of its own, and all must compile one program."""
    parts = toyrun.parts(*WORDS)
    experiment, batch = parts.experiment, batches(parts)[0]
    names, texts = Ordered(experiment.optimizers.whole.accumulates), []
    for backwards in (False, True):
        monkeypatch.setattr(Ordered, "backwards", backwards)
        monkeypatch.setattr(Optimizer, "accumulates", names)
        function = train_function(
            spec(experiment), experiment.tasks["one"], experiment.optimizers.whole
        )
        texts.append(jax.jit(function).lower(parts.state, batch, ticks(0)).as_text())
    assert texts[0] == texts[1]


def test_a_run_says_which_step_is_its_last() -> None:
    experiment = toyrun.parts(*WORDS, "steps=5").experiment
    assert [experiment.optimizers.progress("one", step, {})["last"] for step in range(5)] == [
        0,
        0,
        0,
        0,
        1,
    ]
    assert "last" not in toyrun.parts("steps=5").experiment.optimizers.progress("one", 4, {})


def test_sums_and_averages_have_canonical_names() -> None:
    parts = toyrun.parts(*WORDS, "optimizer.ema=0.9")
    specs = parts.experiment.declaration.specs
    held = state_to_canonical(specs, parts.state)
    names = held["parameters"]
    assert set(held["buffers"]) == {p + n for p in (EMA, SUM) for n in names} | {SUMMED}
    back = state_from_canonical(specs, held)
    jax.tree.map(np.testing.assert_array_equal, back, parts.state)


@pytest.mark.parametrize("counted", [True, False], ids=["as it is", "as earlier versions wrote it"])
def test_a_run_that_stops_within_a_round_ends_in_the_same_bits(
    tmp_path: Path, counted: bool
) -> None:
    """At step 4 of rounds of 3 the sums hold one step, which earlier versions did not count."""
    words = ("optimizer.accumulate=3", "checkpoint.every=4", "steps=8")
    with jax.enable_x64(False):
        toyrun.run(tmp_path / "whole", *words)
        (tmp_path / "parted" / "checkpoints").mkdir(parents=True)
        at = Path("checkpoints", "4")
        shutil.copytree(tmp_path / "whole" / at, tmp_path / "parted" / at)
        read = checkpoint.read_shapes

        def shapes(*arguments: Any) -> Any:
            result = read(*arguments)
            if not counted:
                del result["buffers"][SUMMED]
            return result

        with mock.patch.object(checkpoint, "read_shapes", shapes):
            toyrun.run(tmp_path / "parted", *words)
        assert toyrun.bits(tmp_path / "parted") == toyrun.bits(tmp_path / "whole")


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(UserError, match="task 'two' has the update_scope 'own_clock'"):
        toyrun.parts("optimizer.accumulate=3", "tasks.two.update_scope=own_clock")
    with pytest.raises(UserError, match="config.optimizer.accumulate is 0"):
        toyrun.parts("optimizer.accumulate=0")
