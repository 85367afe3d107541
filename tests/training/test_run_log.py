"""Check what the log of a run writes of each step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath
from harness import deterministic
from toyrun import run

from mmjax.core.workdir import SUMMARY
from mmjax.monitor import metrics
from mmjax.training import run_log


def test_every_line_tells_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "peak_flops", lambda kind: 1e9)
    run(tmp_path, "evaluation.every=0")
    lines = [x for x in metrics.read(epath.Path(tmp_path)) if x["kind"] == "train"]
    assert len(lines) == 12
    sizes = {"one": (8, 16), "two": (16, 48)}
    for found in lines:
        timing = found["timing"]
        assert (found["examples"], found["tokens"]) == sizes[found["task"]]
        assert found["valid_tokens"] == found["tokens"]  # every toy has all of its tokens
        assert timing["mfu"] == pytest.approx(timing["flops_per_second"] / 1e9)
        assert timing["flops_per_second"] * timing["seconds"] > 1e4
        assert timing.get("busy", 1.0) > 0
    # Nothing that is timed is among what must not differ from run to run.
    assert not {"mfu", "flops_per_second", "busy", "wait"} & deterministic(tmp_path)[0].keys()
    assert json.loads((tmp_path / SUMMARY).read_text())["mfu"] > 0
