"""The loop compiles, traces and moves nothing unasked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from harness import deterministic, log
from toyrun import host, run, wrap_calls

from mmjax.monitor.goodput import ActivityLog

COMPILED = "/jax/core/compile/backend_compile_duration"


TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Count JAX's own events by the phase of the run: (phase, event). The first save has a name of its own."""
    counts: Counter[tuple[str, str]] = Counter()
    phases, seen = ["outside"], list[str]()
    phase = ActivityLog.activity

    @contextmanager
    def noted(self: ActivityLog, name: str, **fields: Any) -> Iterator[None]:
        phases.append("first save" if name == "save" and "first save" not in seen else name)
        seen.append(phases[-1])
        with phase(self, name, **fields):
            yield
        phases.pop()

    def listen(event: str, _: float, **__: Any) -> None:
        counts[phases[-1], event] += 1

    monkeypatch.setattr(ActivityLog, "activity", noted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("devices", [1, 8])
def test_as_many_compiles_as_programs_and_none_after(
    tmp_path: Path, devices: int, compiles: Counter[tuple[str, str]]
) -> None:
    run(tmp_path / "run", devices=devices)
    # Two programs of training, two of evaluation, and the one that saving needs.
    assert compiles["compile", COMPILED] == 5
    assert compiles["compile", TRACED] > 0
    # Where arrays are replicated, Orbax slices them by small programs of its own, in its first save.
    for phase in ("step", "save", "eval", *(["first save"] if devices == 1 else [])):
        assert phase == "first save" or _count(tmp_path / "run", phase) >= 2
        assert (compiles[phase, COMPILED], compiles[phase, TRACED]) == (0, 0), compiles


def _count(workdir: Path, phase: str) -> int:
    return sum((x["line"], x.get("phase")) == ("begin", phase) for x in log(workdir))


def test_the_counter_sees_a_compile_in_the_loop(
    tmp_path: Path, compiles: Counter[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    monkeypatch.setattr(jax, "no_tracing", lambda _: pytest.MonkeyPatch.context())
    wrap_calls(monkeypatch, lambda call: _tracing(call))
    run(tmp_path / "run")
    assert compiles["step", COMPILED] == 12


def _tracing(call: Any) -> Any:
    def wrapped(*arguments: Any) -> Any:
        state, metrics = call(*arguments)
        return state, {
            n: jax.jit(lambda x: x + 0)(m) if n == "loss" else m for n, m in metrics.items()
        }

    return wrapped


def test_a_trace_in_the_loop_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap_calls(monkeypatch, _tracing)
    with pytest.raises(RuntimeError, match="[Tt]rac"):
        run(tmp_path / "run")


def test_moving_data_unasked_in_the_loop_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unplaced(call: Any) -> Any:
        return lambda state, batch, ticks: call(state, host(batch), ticks)

    wrap_calls(monkeypatch, unplaced)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
        run(tmp_path / "run")


LATER = 'schedule.phases=({"start": 6, "weights": {"two": 1}},)'


def test_later_phases_compile_before_the_first_step(
    tmp_path: Path, compiles: Counter[tuple[str, str]]
) -> None:
    run(tmp_path / "run", "tasks.two.weight=0", LATER)
    tasks = [x["task"] for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    assert tasks == ["one"] * 6 + ["two"] * 6
    assert (compiles["compile", COMPILED], compiles["step", COMPILED]) == (5, 0)


def test_a_task_that_will_not_run_is_not_compiled(
    tmp_path: Path, compiles: Counter[tuple[str, str]]
) -> None:
    """Neither one without a share, nor one whose last visit is over; their evaluators stay."""
    run(tmp_path / "run", "tasks.two.weight=0", "steps=2")
    assert compiles["compile", COMPILED] == 4
    later = 'schedule.phases=({"start": 2, "weights": {"two": 1}},)'
    run(tmp_path / "run", "tasks.two.weight=0", later, "steps=4", allow_change=True)
    assert compiles["compile", COMPILED] == 8
