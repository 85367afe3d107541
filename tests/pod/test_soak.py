"""A smoke of the soak command; `python tests/pod/soak.py` does hundreds."""

from __future__ import annotations

from pathlib import Path

import soak
from harness import Kill


def test_a_kill_is_dealt_and_survived(tmp_path: Path) -> None:
    tallies = soak.soak(tmp_path, kills=1, seed=3)
    assert tallies.keys() == {"toy", "experts", "buffers", "stats_and_teacher", "own_moments"}
    tally = soak.together(tallies.values())
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


def test_the_table_counts_kills_by_config_and_phase() -> None:
    tallies = {"toy": soak.Tally(), "experts": soak.Tally()}
    tallies["toy"].add([Kill("step", (), 4), Kill("save", (4,), -1)], is_same=True)
    tallies["toy"].add([], is_same=True)
    tallies["experts"].add([Kill("step", (8,), 4)], is_same=False)
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in soak.markdown(tallies, "a command").splitlines()
        if line.startswith("|")
    ]
    head, _, toy, experts, total = (dict(zip(rows[0], row, strict=True)) for row in rows)
    assert {k: v for k, v in toy.items() if v != "0"} == {
        "config": "toy", "runs": "2", "kills": "2", "step": "1", "save": "1",
    }  # fmt: skip
    assert {k: v for k, v in experts.items() if v != "0"} == {
        "config": "experts", "runs": "1", "kills": "1", "step": "1", "asynchronous save": "1",
        "runs that differ": "1",
    }  # fmt: skip
    assert (total["config"], total["kills"], total["step"], total["runs that differ"]) == (
        "all", "3", "2", "1",
    )  # fmt: skip
    assert "a command" in soak.markdown(tallies, "a command") and head["config"] == "config"
