"""A smoke of the injection of faults; `python tests/pod/faults.py` does hundreds, on four runs."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import faults
import numpy as np
import pytest
from faults import Attempt, Injection, Run

from mmjax.engine import arrays


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return faults.train("buffers", tmp_path_factory.mktemp("faults"))


def test_nothing_is_silent(run: Run) -> None:
    """A tenth of what is done to every file, and all that is done to the reading."""
    rng, table = random.Random(0), faults.Table()
    damages = list(faults.damages(run, 1))
    for each in [*rng.sample(damages, len(damages) // 6), *faults.failures(), *faults.OTHERS]:
        table.add(run.name, each.name, each.where, each.allowed, faults.attempt(run, each, rng))
    assert not table.wrong
    total = table.total()
    assert total["silent"] == total["traceback"] == 0
    assert min(total["previous"], total["refused"], total["harmless"]) > 3


@pytest.mark.parametrize("size", [0, 3000])
def test_a_full_disk_ends_a_run_and_loses_no_checkpoint(run: Run, size: int) -> None:
    found = faults.fill_disk(run, size)
    assert found.outcome == "refused" and found.words.startswith("File too large: /")


@pytest.mark.parametrize(("fate", "outcome"), [("lives", "refused"), ("was killed", "harmless")])
def test_a_workdir_that_another_process_holds_is_refused_while_it_lives(
    run: Run, fate: str, outcome: str
) -> None:
    assert faults.intrude(run, fate).outcome == outcome


def changed(workdir: Path, rng: random.Random) -> Any:
    """Change values, with no checksum to show it."""
    mine = arrays.read

    def read(*arguments: Any) -> Any:
        state = mine(*arguments)
        name = next(iter(state["parameters"]))
        state["parameters"][name] = state["parameters"][name] + np.float32(1)
        return state

    return mock.patch.object(arrays, "read", read)


def gone(workdir: Path, rng: random.Random) -> Any:
    shutil.rmtree(workdir / "checkpoints" / "12")
    return nullcontext()


def broken(workdir: Path, rng: random.Random) -> Any:
    def fail(*_: Any) -> Iterator[None]:
        raise AssertionError("a fault of our own")

    return mock.patch.object(arrays, "index", fail)


@pytest.mark.parametrize(
    ("apply", "outcome"), [(changed, "silent"), (gone, "silent"), (broken, "refused")]
)
def test_what_goes_wrong_is_counted(run: Run, apply: Callable[..., Any], outcome: str) -> None:
    """The control: values that changed, and an older checkpoint without a word."""
    table, injection = faults.Table(), Injection("x", "y", apply, ("harmless",))
    found = faults.attempt(run, injection, random.Random(0))
    assert found.outcome == outcome
    table.add(run.name, "x", "y", injection.allowed, found)
    assert len(table.wrong) == 1 and table.total()[outcome] == 1
    assert f"| x | y | 1 | {' | '.join(str(int(o == outcome)) for o in faults.OUTCOMES)} |" in (
        table.markdown("a command")
    )


def test_a_traceback_is_counted_as_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "begin", lambda *_: {}["no such key"])
    found = faults.attempt(run, Injection("x", "y", gone), random.Random(0))
    assert found == Attempt("traceback", "KeyError: 'no such key'")
