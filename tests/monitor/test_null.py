"""Check what processes that write no files use: the same calls as the real ones, and nothing comes of them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from mmjax.monitor.goodput import ActivityLog
from mmjax.monitor.metrics import MetricWriter
from mmjax.monitor.null import NullActivities, NullMetrics


def public(kind: type) -> set[str]:
    return {n for n, v in vars(kind).items() if inspect.isfunction(v) and not n.startswith("_")}


@pytest.mark.parametrize(
    ("muted", "real"), [(NullMetrics, MetricWriter), (NullActivities, ActivityLog)]
)
def test_every_call_of_the_real_one_is_muted(muted: type, real: type) -> None:
    """A method that is inherited would write to a file that was never opened."""
    assert public(muted) == public(real)


def test_metrics_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with NullMetrics() as writer:
        writer.write(0, "one", {"loss": 1.0}, {"seconds": 2.0})
        writer.write_eval(0, [{"name": "a"}])
        writer.add(0, {"loss": 1.0})
        writer.flush()
    assert not list(tmp_path.iterdir())


def test_phases_run_their_blocks_and_pass_errors_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[Any] = []
    with NullActivities() as phases:
        with phases.activity("step", step=3):
            ran.append("step")
        with pytest.raises(KeyError), phases.activity("save"):
            raise KeyError("lost")
        phases.add("wait_data", 1.0)
        phases.beat(step=3)
        phases.event("stuck", text="here")
    assert ran == ["step"] and not list(tmp_path.iterdir())
