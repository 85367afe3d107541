"""A smoke of the soak command; `python tests/pod/soak.py` does hundreds."""

from __future__ import annotations

from pathlib import Path

import soak
from harness import Kill


def test_a_kill_is_dealt_and_survived(tmp_path: Path) -> None:
    tally = soak.soak(tmp_path, kills=1, seed=3)
    assert (tally.kills, tally.survived, tally.lost) == (1, 1, 0)
    assert sum(tally.hits.values()) >= 1
    assert str(tally).startswith("1 of 1 kills survived bit for bit, in ")


def test_what_did_not_survive_is_counted() -> None:
    tally = soak.Tally()
    tally.add([Kill("step", (), 4), Kill("save", (4,), -1)], is_same=False)
    tally.add([Kill("step", (8,), 4)], is_same=True)
    assert (tally.kills, tally.survived, tally.lost, tally.runs) == (3, 1, 2, 2)
    assert str(tally).startswith("1 of 3 kills")
    assert tally.hits == {"step": 2, "save": 1, "asynchronous save": 1}
