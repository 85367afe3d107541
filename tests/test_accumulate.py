"""One update of several steps: the gradient of the tasks' losses, summed by their shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun

from mmjax.errors import UserError
from mmjax.program import loss_function, train_function
from mmjax.state import EMA, SUM, State, state_from_canonical, state_to_canonical

WORDS = ("optimizer.accumulate=3", "dtype.parameters=float64", "dtype.compute=float64")
ORDER = ("one", "two", "one")  # by the shares 2 and 1


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def ticks(step: int) -> dict[str, Any]:
    return {"step": np.int32(step), "visit": np.int32(sum(t == ORDER[step] for t in ORDER[:step]))}


def step(parts: toyrun.Parts, state: State, number: int, batch: Any) -> tuple[State, Any]:
    experiment = parts.experiment
    task = experiment.tasks[ORDER[number]]
    function = train_function(task, experiment.declaration, experiment.optimizer, np.float64, 0)
    return jax.jit(function)(state, batch, ticks(number))


def batches(parts: toyrun.Parts) -> list[Any]:
    starts = (0, 0, 8)
    sizes = [parts.experiment.tasks[name].batch for name in ORDER]
    return [parts.batch(t, range(s, s + n)) for t, s, n in zip(ORDER, starts, sizes, strict=True)]


def gradient(parts: toyrun.Parts, number: int, batch: Any) -> dict[str, np.ndarray]:
    experiment = parts.experiment
    loss_of = loss_function(experiment.tasks[ORDER[number]], experiment.declaration, np.float64, 0)
    visit = ticks(number)["visit"]
    found = jax.grad(lambda p: loss_of(p, {}, batch, visit).value)(parts.state.parameters)
    return toyrun.host(found)


def test_a_round_is_one_step_on_the_mean_of_its_gradients() -> None:
    """Against AdamW in NumPy, its first step: `m / (sqrt(v) + eps)` is `g / (|g| + eps)`."""
    parts = toyrun.parts(*WORDS, "optimizer.clip=0.0")
    before, state = toyrun.host(parts.state.parameters), parts.state
    made = batches(parts)
    grads = [gradient(parts, i, batch) for i, batch in enumerate(made)]
    for number, batch in enumerate(made):
        for name in before:  # nothing moves within a round
            np.testing.assert_array_equal(state.parameters[name], before[name])
        state, told = step(parts, state, number, batch)
        assert bool(told["finite"])
    config, optimizer = parts.experiment.run.optimizer, parts.experiment.optimizer
    rate = float(optimizer.rate("one", ticks(2)))
    for name, old in before.items():
        mean = sum(g[name] for g in grads) / 3
        direction = mean / (np.abs(mean) + config.eps)
        decay = config.weight_decay * parts.experiment.declaration.specs[name].decay
        expected = old - rate * (direction + decay * old)
        np.testing.assert_allclose(state.parameters[name], expected, rtol=1e-10, atol=1e-12)
        assert np.abs(expected - old).max() > 0
        np.testing.assert_array_equal(state.buffers[SUM + name], np.zeros_like(old))
    assert {int(np.max(leaf["count"])) for leaf in state.optimizer.values()} == {1}


@pytest.mark.parametrize("bad", [0, 2], ids=["within a round", "at its end"])
def test_a_gradient_that_is_not_finite_is_left_out_of_its_round(bad: int) -> None:
    parts = toyrun.parts(*WORDS, "optimizer.clip=0.0")
    made, state = batches(parts), parts.state
    grads = [gradient(parts, i, batch) for i, batch in enumerate(made)]
    before = toyrun.host(parts.state.parameters)
    for number, batch in enumerate(made):
        if number == bad:
            batch = jax.tree.map(lambda x: x * np.nan if x.dtype.kind == "f" else x, batch)
        state, told = step(parts, state, number, batch)
        assert bool(told["finite"]) == (number != bad)
    name = next(iter(before))
    mean = sum(g[name] for i, g in enumerate(grads) if i != bad) / 3
    config = parts.experiment.run.optimizer
    rate = float(parts.experiment.optimizer.rate("one", ticks(2)))
    decay = config.weight_decay * parts.experiment.declaration.specs[name].decay
    expected = before[name] - rate * (mean / (np.abs(mean) + config.eps) + decay * before[name])
    np.testing.assert_allclose(state.parameters[name], expected, rtol=1e-10, atol=1e-12)


def test_sums_and_averages_have_canonical_names() -> None:
    parts = toyrun.parts(*WORDS, "optimizer.ema=0.9")
    specs = parts.experiment.declaration.specs
    held = state_to_canonical(specs, parts.state)
    names = held["parameters"]
    assert set(held["buffers"]) == {p + n for p in (EMA, SUM) for n in names}
    back = state_from_canonical(specs, held)
    jax.tree.map(np.testing.assert_array_equal, back, parts.state)


def test_a_run_that_stops_within_a_round_ends_in_the_same_bits(tmp_path: Path) -> None:
    words = ("optimizer.accumulate=3", "checkpoint.every=4", "steps=9")
    toyrun.run(tmp_path / "whole", *words)
    toyrun.run(tmp_path / "parted", *words[:2], "steps=4")
    toyrun.run(tmp_path / "parted", *words)
    assert toyrun.bits(tmp_path / "parted") == toyrun.bits(tmp_path / "whole")


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(UserError, match="task 'two' has the view 'own_clock'"):
        toyrun.parts("optimizer.accumulate=3", "tasks.two.view=own_clock")
    with pytest.raises(UserError, match="config.optimizer.accumulate is 0"):
        toyrun.parts("optimizer.accumulate=0")
