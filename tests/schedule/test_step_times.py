"""Step times: what a run's lines state, and what is assumed where they lack it."""

import pytest

from mmjax.core.chips import peak_flops
from mmjax.schedule.step_times import CORE_FLOPS, assumed_rate, measured, pace


def line(task, kind="train", **timing):
    return {"kind": kind, "task": task, "step": 0, "timing": timing}


def test_measured_is_the_median_of_what_was_met_in_time():
    lines = [line("a", seconds=9, busy=b) for b in (1.0, 2.0, 90.0)] + [line("a", seconds=0.1)]
    lines += [line("b", seconds=s) for s in (3.0, 5.0)] + [line("c", kind="eval", seconds=1)]
    assert measured(lines) == {"a": 2.0, "b": 4.0}
    assert measured([]) == {}


def test_only_the_latest_visits_count():
    lines = [line("a", busy=100.0, seconds=100.0)] * 60 + [line("a", busy=1.0, seconds=1.0)] * 51
    assert measured(lines) == {"a": 1.0}


def test_tasks_without_times_run_at_the_rate_of_the_others():
    found = pace({"a": 10e9, "b": 30e9, "c": 5e9}, {"a": 2.0, "c": 1.0}, rate=1.0)
    assert (found.seconds, found.measured, found.rate) == ({"a": 2, "b": 6, "c": 1}, ("a", "c"), 5e9)  # fmt: skip
    found = pace({"a": 10e9, "b": 30e9}, {}, rate=1e9)
    assert (found.seconds, found.measured, found.rate) == ({"a": 10, "b": 30}, (), 1e9)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_what_is_assumed(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert assumed_rate("cpu", 8) == 3 * CORE_FLOPS  # forced devices are no more cores
    assert assumed_rate("TPU v4", 8) == pytest.approx(0.4 * 8 * 275e12)
