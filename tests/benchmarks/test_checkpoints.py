"""The benchmark of checkpoints: what it restores is what it saved, by ours and by Orbax alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import checkpoints
from benchmarks._pairs import Effort
from benchmarks.checkpoints import Peer


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SIZES", (0.001,))
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)


def test_all_are_timed() -> None:
    found = {each.name: each for each in checkpoints.measure(Effort({}, 3, 1))}
    for kind in ("blocked", "saved", "restored"):
        assert len(found[f"0.001 GB, {kind}: mmjax to Orbax"].values) == 3
        assert min(found[f"0.001 GB, {kind}: mmjax"].values) > 0


def test_what_is_lost_is_not_timed(tmp_path: Path) -> None:
    values = checkpoints.arrays(0.001)
    assert sum(x.nbytes for x in values.values()) == pytest.approx(1e6, rel=0.05)
    torn = {name: np.array(x) for name, x in values.items()}
    torn["part_3"][0, 0] += 1
    with pytest.raises(AssertionError):
        checkpoints._once(Peer(lambda _: lambda: None, lambda _: torn), tmp_path, values)
    del torn["part_3"]
    with pytest.raises(AssertionError):
        checkpoints._once(Peer(lambda _: lambda: None, lambda _: torn), tmp_path, values)
