"""Two processes: records that cannot be read are counted once, and evaluation finds what training did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import toyrun
from etils import epath
from harness import LIMIT, contents
from test_processes import CLOSE, HERE, Team, free_port, same

from mmjax.engine import arrays

BAD = (3, 5, 17)
# Wide enough that arrays are stored by themselves, and not in the nodes of the index.
WORDS = (f"--config.tasks.one.source.corrupt={BAD}", "--config.model.width=32")


@pytest.fixture(scope="module")
def teams(
    tmp_path_factory: pytest.TempPathFactory, environment_of: Callable[..., dict[str, str]]
) -> tuple[Team, Team]:
    """Return a run of one process and one of two, with records that cannot be read."""
    toyrun.block()
    made = []
    for count in (1, 2):
        made.append(Team(tmp_path_factory.mktemp(f"of{count}"), environment_of))
        ended = made[-1].run(count, 1, "whole", *WORDS)
        assert ended.statuses == [0] * count, ended.said
        assert all(f"record {bad} is garbage" in ended.said[0] for bad in BAD)
    return made[0], made[1]


def test_corrupt_records_are_counted_alike(teams: tuple[Team, Team]) -> None:
    one, two = teams
    same(one, two)
    ids = [i for step in two.ids("whole") for i in step]
    counts = [toyrun.meta(team.workdir)["clock"]["invalid"] for team in teams]
    assert counts[0] == counts[1] and counts[0]["one"] >= len(BAD) and counts[0]["two"] == 0
    assert ids == [i for step in one.ids("whole") for i in step]


def test_evaluation_by_two_processes(
    teams: tuple[Team, Team], environment_of: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    workdir, port = teams[1].workdir, free_port()
    before = json.loads((workdir / "results.json").read_text())
    words = [
        f"--extra={HERE.parent / 'extra'}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}",
        "--processes=2",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mmjax", "evaluate", *words, f"--process={index}"],
            env=environment_of(1, {"JAX_ENABLE_X64": "1"}),
        )
        for index in range(2)
    ]
    try:
        assert [each.wait(LIMIT) for each in started] == [0, 0]
    finally:
        for each in started:
            each.kill()
    found = [json.loads(x) for x in (workdir / "evaluations.jsonl").read_text().splitlines()]
    for record in found:
        assert "mmjax evaluate" in record.pop("command") and record.pop("time")
    assert [{**r, "value": 0, "chance": 0} for r in found] == [
        {**r, "value": 0, "chance": 0} for r in before
    ]
    for now, then in zip(found, before, strict=True):
        assert abs(now["value"] - then["value"]) <= CLOSE * abs(then["value"])


def test_what_one_process_cannot_read_ends_all_and_what_is_damaged_none_takes(
    teams: tuple[Team, Team], tmp_path: Path
) -> None:
    """A disk that fails under the second process; then a part that the second process had stored, changed."""
    team = Team(tmp_path, teams[1].environment_of)
    shutil.copytree(teams[1].workdir, team.workdir)
    shutil.rmtree(team.workdir / "checkpoints" / "4")
    bits, before = toyrun.bits(team.workdir), contents(team.workdir)
    ended = team.run(2, 1, "unreadable", *WORDS, environment={"MEMBER_UNREADABLE": "1"})
    assert ended.statuses == [2, 2], ended.said
    assert "Process 1: Checkpoint" in ended.said[0] and "Input/output error" in ended.said[0]
    assert contents(team.workdir) == before

    state = epath.Path(team.workdir / "checkpoints" / "12" / "state")
    stored = arrays.index(state, 12)
    assert {len(each.parts) for each in stored.values()} == {1, 2}  # each process stores a part
    # All of what it stored: some files are of earlier writes, and nothing refers to them.
    for path in Path(state).glob("ocdbt.process_1/d/*"):
        content = bytearray(path.read_bytes())
        content[::64] = bytes(byte ^ 8 for byte in content[::64])
        path.write_bytes(content)
    ended = team.run(2, 1, "damaged", *WORDS)
    assert ended.statuses == [0, 0], ended.said
    assert "Checkpoint 12 is damaged" in ended.said[0] and "Resuming from step 8" in ended.said[0]
    assert (team.workdir / "torn" / "12").exists()
    assert toyrun.bits(team.workdir) == bits
