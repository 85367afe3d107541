"""Runs that were interrupted, against one that nothing disturbed."""

from __future__ import annotations

from pathlib import Path

import toyrun
from harness import deterministic

from mmjax.data import order

BATCH = {"one": 8, "two": 16}
COUNT = 40


def same(workdir: Path, other: Path) -> None:
    """Check that both ended in the same bits, and their metrics are the same."""
    assert toyrun.bits(workdir) == toyrun.bits(other)
    assert deterministic(workdir) == deterministic(other)
    assert (workdir / "results.json").read_bytes() == (other / "results.json").read_bytes()


def ids(task: str, first: int, count: int) -> list[int]:
    """Return the examples at positions `first` to `first + count` of a task."""
    return [int(i) for i in order.example_ids(toyrun.SEED, task, first, count, COUNT)]
