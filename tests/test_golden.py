"""Checkpoints of every format that ever was are read, and resume."""

from __future__ import annotations

import ast
import json
import zipfile
from pathlib import Path

import pytest
import toyrun
from harness import deterministic
from toyrun import block, run

from mmjax.core.migrations import upgrade

GOLDEN = Path(__file__).resolve().parent / "golden"
SAME = ("optimizer.ema=0.9", "tasks.one.source.corrupt=(3,)")


@pytest.fixture(params=sorted(p.name for p in GOLDEN.glob("*.zip")))
def workdir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with zipfile.ZipFile(GOLDEN / request.param) as file:
        file.extractall(tmp_path)
    block()
    return tmp_path


def test_the_first_format_is_there() -> None:
    assert (GOLDEN / "format1.zip").stat().st_size < 50_000


def test_every_bit_is_read(workdir: Path) -> None:
    expected = json.loads((workdir / "expected.json").read_text())
    bits, config = expected["bits"].split(" {'steps'")
    found, today = toyrun.bits(workdir).split(" {'steps'")
    assert found == bits
    # The config that it holds is read under today's names (tests/core/test_renamed_keys.py).
    today = ast.literal_eval("{'steps'" + today)
    assert today == upgrade(ast.literal_eval("{'steps'" + config), 1)
    assert today["model"] == {"layers": [{"repeat": 2, "blocks": [{"name": "toy"}]}], "width": 8}
    assert [task["weight"] for task in today["tasks"].values()] == [2, 1]
    # The same by another way than the digest.
    held = toyrun.parameters(workdir)
    assert {n: float(x.astype("float64").sum()) for n, x in held.items()} == expected["sums"]
    assert toyrun.meta(workdir)["clock"]["positions"] == {"one": 24, "two": 16}


def test_it_goes_on(workdir: Path) -> None:
    before = toyrun.meta(workdir)["clock"]
    run(workdir, *SAME, "steps=8")
    after = toyrun.meta(workdir)["clock"]
    assert before["step"] == 4 and after["step"] == 8
    assert after["positions"] == {"one": 40, "two": 48}
    steps = [x["step"] for x in deterministic(workdir) if x["kind"] == "train"]
    assert steps == list(range(8))
