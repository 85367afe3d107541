"""Killed from outside at any moment and started again, a run ends in the same bits.

Of the toy config, whose processes start quickly; `tests/smoke` kills a run on real data.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import toyrun
from harness import (
    ASYNC_SAVE,
    Aim,
    Harness,
    Kill,
    NotMetError,
    deterministic,
    finished_steps,
    log,
    survive,
)

SEED, STEPS = 20, 40
ACTIVITIES = ("init", "compile", "restore", "step", "save", "eval", ASYNC_SAVE)

# In this order, so that the later kills find a checkpoint to resume from: the fourth stretch of steps
# begins only when the first checkpoint is whole.
AIMS = (
    Aim("save", delay=0.05),
    Aim(ASYNC_SAVE),
    Aim("step", 4),
    Aim("init", delay=0.05),
    Aim("restore", delay=0.02),
    Aim("save", delay=0.02),
    Aim("eval", delay=0.02),
)


@dataclass(frozen=True)
class Survivor:
    """A run that was killed in every activity, and then finished."""

    workdir: Path
    kills: list[Kill]


@pytest.fixture(scope="module")
def survivor(
    toy_command: Callable[..., Harness], tmp_path_factory: pytest.TempPathFactory
) -> Survivor:
    # A kill that misses all of its activities leaves none for a later one: then all of it again.
    for attempt in range(6):
        workdir = tmp_path_factory.mktemp("survivor") / "run"
        cache = tmp_path_factory.mktemp("cache")
        run: Harness = toy_command(workdir, f"--config.steps={STEPS}")
        # Once where XLA really compiles: with a cache of its own, which is empty.
        cold = replace(
            run, environment={**run.environment, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        )
        try:
            first = cold.kill(Aim("compile", delay=1.0), random.Random(SEED + attempt))
            return Survivor(workdir, [first, *survive(run, AIMS, SEED + attempt)])
        except NotMetError as error:
            last = str(error).splitlines()[0]
    raise AssertionError(f"six times a kill did not fall where it was aimed; the last: {last}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same run, not killed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    toyrun.run(workdir, f"steps={STEPS}")
    return workdir


def test_every_phase_was_hit(survivor: Survivor) -> None:
    """By the log that each process left behind."""
    kills = survivor.kills
    assert {activity for kill in kills for activity in kill.hits} >= set(ACTIVITIES)
    assert kills[0].activity == "compile"
    attempts = {line["attempt"] for line in log(survivor.workdir)}
    assert attempts == set(range(len(kills) + 1))
    # Some died before the first checkpoint, some after; what is finished is never lost.
    newest = [kill.newest for kill in kills]
    assert newest[0] == -1 and newest[-1] >= 4 and newest == sorted(newest)


def test_the_bits_are_those_of_a_run_that_was_not_killed(
    survivor: Survivor, straight: Path, digest_of: Callable[[Path], str]
) -> None:
    assert digest_of(survivor.workdir) == digest_of(straight)
    assert toyrun.bits(survivor.workdir) == toyrun.bits(straight)
    assert finished_steps(survivor.workdir)[-1] == finished_steps(straight)[-1] == STEPS


def test_the_metrics_have_no_gap_and_no_repeat(survivor: Survivor, straight: Path) -> None:
    found = deterministic(survivor.workdir)
    assert found == deterministic(straight)
    assert [x["step"] for x in found if x["kind"] == "train"] == list(range(STEPS))


def test_the_results_are_the_same(survivor: Survivor, straight: Path) -> None:
    results = (survivor.workdir / "results.json").read_bytes()
    assert results == (straight / "results.json").read_bytes()


def test_a_digest_is_one_of_the_parameters(straight: Path, digest_of: Callable[..., str]) -> None:
    """The control: another checkpoint of the same run has another digest."""
    digests = {digest_of(straight, f"--step={s}") for s in finished_steps(straight)}
    assert len(digests) == 3 and all(len(d) == 64 for d in digests)
