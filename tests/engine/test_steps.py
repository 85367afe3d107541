"""Programs: compiled before the first step, and what a step does and leaves undone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toyrun
from etils import epath
from harness import deterministic, log
from toyrun import Parts, host, parts, run, watched

from mmjax import train
from mmjax.core.errors import UserError
from mmjax.engine.compile import LimitsConfig, Program, compile_all, use_cache
from mmjax.monitor.goodput import PhaseLog

COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


# --- compiled once, before the first step ------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Counts JAX's own events by the phase of the run: (phase, event). The first save has a name of its own."""
    counts: Counter[tuple[str, str]] = Counter()
    phases, seen = ["outside"], list[str]()
    phase = PhaseLog.phase

    @contextmanager
    def noted(self: PhaseLog, name: str, **fields: Any) -> Iterator[None]:
        phases.append("first save" if name == "save" and "first save" not in seen else name)
        seen.append(phases[-1])
        with phase(self, name, **fields):
            yield
        phases.pop()

    def listen(event: str, _: float, **__: Any) -> None:
        counts[phases[-1], event] += 1

    monkeypatch.setattr(PhaseLog, "phase", noted)
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
    _wrap_calls(monkeypatch, lambda call: _tracing(call))
    run(tmp_path / "run")
    assert compiles["step", COMPILED] == 12


def _wrap_calls(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any]) -> None:
    """Training programs whose call is wrapped."""

    def compiled(requests: Mapping[str, Any], *arguments: Any) -> dict[str, Program]:
        programs = compile_all(requests, *arguments)
        return {
            name: replace(p, call=wrap(p.call)) if requests[name].kind == "train" else p
            for name, p in programs.items()
        }

    monkeypatch.setattr(train, "compile_all", compiled)


def _tracing(call: Any) -> Any:
    def wrapped(*arguments: Any) -> Any:
        state, metrics = call(*arguments)
        return state, {
            n: jax.jit(lambda x: x + 0)(m) if n == "loss" else m for n, m in metrics.items()
        }

    return wrapped


def test_a_trace_in_the_loop_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wrap_calls(monkeypatch, _tracing)
    with pytest.raises(RuntimeError, match="[Tt]rac"):
        run(tmp_path / "run")


def test_moving_data_unasked_in_the_loop_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unplaced(call: Any) -> Any:
        return lambda state, batch, ticks: call(state, host(batch), ticks)

    _wrap_calls(monkeypatch, unplaced)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
        run(tmp_path / "run")


def test_two_steps_are_in_flight_and_never_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flying: list[Any] = []
    most: list[int] = []
    get = jax.device_get

    def counted(call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            state, metrics = call(*arguments)
            flying.append(metrics)
            most.append(len(flying))
            return state, metrics

        return wrapped

    def fetched(tree: Any) -> Any:
        flying[:] = [metrics for metrics in flying if metrics is not tree]
        return get(tree)

    _wrap_calls(monkeypatch, counted)
    monkeypatch.setattr(jax, "device_get", fetched)
    run(tmp_path / "run", "checkpoint.every=0", "evaluation.every=0")
    assert len(most) == 12 and not flying
    # The first is alone; each later one is sent before its predecessor has been asked for.
    assert most == [1] + [2] * 11


# --- the table, the limits ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> Parts:
    return parts()


@pytest.fixture(scope="module")
def programs(toy: Parts) -> dict[str, Program]:
    requests = toy.experiment.train_requests(toy.mesh) | toy.experiment.eval_requests(toy.mesh)
    return compile_all(requests, toy.mesh, LimitsConfig())


def test_the_table_tells_what_was_compiled(programs: Mapping[str, Program]) -> None:
    reports = {name: p.report for name, p in programs.items()}
    assert [(r["name"], r["kind"], r["shape"]) for r in reports.values()] == [
        ("one", "train", "8 x 2x6"),
        ("two", "train", "16 x 3x6"),
        ("one", "loss", "8 x 2x6"),
        ("two", "loss", "8 x 3x6"),
    ]
    for report in reports.values():
        assert report["compile_seconds"] > 0 and isinstance(report["cached"], bool)
    # Dot products per token: stem 6 x 8, two layers of 8 x 8; per row the head, 8 x 1.
    forward = {"one": 8 * (2 * (48 + 128) + 8) * 2, "two": 16 * (3 * (48 + 128) + 8) * 2}
    assert reports["one/loss"]["flops"] == forward["one"]
    for task, flops in forward.items():
        stem = {"one": 8 * 2 * 48 * 2, "two": 16 * 3 * 48 * 2}[task]  # no gradient of the input
        assert reports[task]["flops"] == 3 * flops - stem


def test_bytes_cover_the_state_once() -> None:
    """The state is donated: it counts as argument, and not again as output beside a step's temporaries."""
    wide = parts("model.width=256", "tasks.one.batch=1")
    request = wide.experiment.train_requests(wide.mesh)["one"]
    state = sum(x.nbytes for x in jax.tree.leaves(wide.state))
    programs = compile_all({"one": request}, wide.mesh, LimitsConfig())
    assert state < programs["one"].report["bytes"] < 2.2 * state


def test_what_does_not_fit_is_refused_by_name(toy: Parts, programs: Mapping[str, Program]) -> None:
    requests = toy.experiment.train_requests(toy.mesh)
    one, two = (programs[t].report["bytes"] for t in ("one", "two"))
    assert one < two
    with pytest.raises(UserError) as error:
        compile_all(requests, toy.mesh, LimitsConfig(memory_gib=(one + two) / 2 / 2**30))
    assert "two: " in str(error.value) and "one: " not in str(error.value)
    assert "limits.memory_gib" in str(error.value)
    assert compile_all(requests, toy.mesh, LimitsConfig(memory_gib=two / 2**30))


def test_nothing_starts_when_a_program_does_not_fit(tmp_path: Path) -> None:
    with watched() as seen, pytest.raises(UserError, match="limits.memory_gib") as error:
        run(tmp_path / "run", "limits.memory_gib=1e-6")
    assert "two: " in str(error.value)
    assert not seen.ids and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_config_of_too_many_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", "limits.programs=3")
    said = str(error.value)
    assert "4 programs" in said and "limits.programs = 3" in said and "one, two" in said
    run(tmp_path / "run", "limits.programs=4", "steps=1")


LATER = 'schedule.phases=({"start": 6, "weights": {"two": 1}},)'


def test_a_program_of_a_later_phase_is_refused_at_the_start(
    tmp_path: Path, programs: Mapping[str, Program]
) -> None:
    one, two = (programs[task].report["bytes"] for task in ("one", "two"))
    limit = f"limits.memory_gib={(one + two) / 2 / 2**30}"
    with watched() as seen, pytest.raises(UserError, match="limits.memory_gib") as error:
        run(tmp_path / "run", "tasks.two.weight=0", LATER, limit)
    assert "two: " in str(error.value) and "one: " not in str(error.value)
    assert not seen.ids
    # The control: the same limit is kept by what runs before.
    run(tmp_path / "run", "tasks.two.weight=0", limit, "steps=6")


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


def test_the_second_compilation_is_a_hit(tmp_path: Path) -> None:
    with _cache(tmp_path / "cache"):
        cached = [_one_anew().report["cached"] for _ in range(2)]
    assert cached == [False, True]


@pytest.mark.parametrize("unit", ["steps", "examples", "visits"])
def test_a_run_of_another_length_has_the_same_programs(unit: str) -> None:
    """To the letter, whatever its length, its warm-up and its phases' rates; another peak is another program."""
    phase = 'schedule.phases=[{"start": 8, "learning_rate": %s}]'

    def texts(*overrides: str) -> dict[str, str]:
        toy = parts("optimizer.decay=cosine", f"optimizer.unit={unit}", *overrides)
        requests, texts = toy.experiment.train_requests(toy.mesh), {}
        for name, r in requests.items():
            jitted = jax.jit(r.function, donate_argnums=r.donate, out_shardings=r.out_shardings)
            with jax.set_mesh(toy.mesh):
                texts[name] = jitted.lower(*r.arguments).as_text()
        return texts

    first = texts("steps=40")
    assert set(first) == {"one", "two"}
    assert texts("steps=41") == first
    assert texts("steps=40", "optimizer.warmup=0") == first
    assert texts("steps=40", phase % 0.1) == first
    assert texts("steps=40", "optimizer.learning_rate=0.5") != first


def test_the_cache_has_the_programs_of_a_run_of_another_length(tmp_path: Path) -> None:
    words = ("model.width=4", "optimizer.decay=cosine")
    with _cache(tmp_path / "cache"):
        cached = [_one_anew(*words, steps).report["cached"] for steps in ("steps=40", "steps=41")]
    assert cached == [False, True]


def _one_anew(*overrides: str) -> Program:
    """The program of a task, traced again."""
    toy = parts("model.width=4", *overrides)
    requests = {"one": toy.experiment.train_requests(toy.mesh)["one"]}
    return compile_all(requests, toy.mesh, LimitsConfig())["one"]


def test_a_cache_torn_by_a_kill_does_no_harm(tmp_path: Path) -> None:
    """Entries cut short are compiled anew, to a program that gives the same bits."""
    results = []
    with _cache(tmp_path / "cache"):
        for _ in range(2):
            call, toy = _one_anew().call, parts("model.width=4")
            batch, when = toy.batch("one", range(8)), toy.ticks("one", 3, 2)
            results.append(host(call(toy.state, batch, when)))
            entries = [p for p in (tmp_path / "cache").rglob("*-cache") if p.is_file()]
            assert entries
            for entry in entries:
                entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert _equal(*results)


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Another folder for compiled programs, empty at first; nothing is taken from memory."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        compilation_cache.reset_cache()
        use_cache()
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_the_cache_folder_is_the_one_jax_is_told_or_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _cache(tmp_path / "told"):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "told")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        use_cache()
        assert epath.Path(jax.config.values["jax_compilation_cache_dir"]).is_relative_to(
            tmp_path / "home"
        )


# --- a step ------------------------------------------------------------------------------------


def _equal(one: Any, two: Any) -> bool:
    """Whether two trees of arrays hold the same bits (NaN equals NaN)."""
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), one, two)
    return all(jax.tree.leaves(same))


def _stepped(toy: Parts, task: str, ids: Any, step: int = 3) -> tuple[Any, Any]:
    """State and metrics after one step of a task on a copy of the initial state."""
    request = toy.experiment.train_requests(toy.mesh)[task]
    call = compile_all({task: request}, toy.mesh, LimitsConfig())[task].call
    copied = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), toy.state)
    batch = toy.batch(task, ids)
    state, metrics = call(copied, batch, toy.ticks(task, step, 2))
    assert all(x.is_deleted() for x in jax.tree.leaves(copied.parameters))  # donated
    return host(state), host(metrics)


@pytest.mark.parametrize("kind", ["bad_loss", "bad_gradient"])
def test_a_non_finite_step_leaves_every_bit_as_it_was(kind: str) -> None:
    toy = parts(f"tasks.one.objective.{kind}=(13,)", "optimizer.ema=0.9")
    before = host(toy.state)
    assert before.buffers and before.optimizer
    after, metrics = _stepped(toy, "one", [13, *range(7)])
    assert not metrics["finite"]
    # Either alone is enough.
    assert np.isfinite(metrics["loss"]) == (kind == "bad_gradient")
    assert np.isfinite(metrics["grad_norm"]) == (kind == "bad_loss")
    assert _equal(after, before)
    # The control: without that example all three parts move.
    after, metrics = _stepped(toy, "one", range(8))
    assert metrics["finite"]
    for part in ("parameters", "optimizer", "buffers"):
        assert not _equal(getattr(after, part), getattr(before, part))


def test_a_batch_without_a_valid_row_leaves_every_bit_as_it_was() -> None:
    """It decays no weight and spends no momentum; it is not a step that failed either."""
    toy = parts("optimizer.ema=0.9")
    before = host(toy.state)
    after, metrics = _stepped(toy, "one", [])
    assert metrics["finite"] and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert _equal(after, before)


def test_an_invalid_row_reaches_neither_loss_nor_gradient() -> None:
    """Five examples and three blank rows are worth as much as a batch of five."""
    bare = ("tasks.one.objective.hidden=0.0",)
    _, blank = _stepped(parts(*bare), "one", range(5))
    _, small = _stepped(parts(*bare, "tasks.one.batch=5"), "one", range(5))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(blank[name], small[name], rtol=1e-5)
    _, whole = _stepped(parts(*bare), "one", range(8))
    assert abs(whole["loss"] - small["loss"]) > 1e-3


def test_the_state_keeps_its_shardings() -> None:
    """Else the next call would compile again."""
    toy = parts("mesh.fsdp=2", "mesh.tensor=2", devices=8)
    abstract = toy.experiment.abstract_state(toy.mesh)
    state = toy.state
    programs = compile_all(toy.experiment.train_requests(toy.mesh), toy.mesh, LimitsConfig())
    for task in ("one", "two", "one"):
        batch = toy.batch(task, range(8))
        state, _ = programs[task].call(state, batch, toy.ticks(task, 1, 1))
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True)
        assert all(x.sharding == a.sharding for x, a in pairs)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


# --- a run with non-finite steps ---------------------------------------------------------------


def _events(workdir: Path, name: str) -> list[str]:
    return [x["text"] for x in log(workdir) if x["line"] == "event" and x["name"] == name]


def test_a_non_finite_step_is_counted_and_names_its_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    with watched() as seen:
        run(workdir, "tasks.one.objective.bad_loss=(13,)", "checkpoint.every=5")
    tasks = [x["task"] for x in deterministic(workdir) if x["kind"] == "train"]
    steps = zip(range(12), tasks, seen.ids, strict=True)
    bad = {step: ids for step, task, ids in steps if task == "one" and 13 in ids}
    assert 0 < len(bad) < 8
    assert toyrun.meta(workdir)["clock"]["skipped"] == {"one": len(bad), "two": 0}
    events = _events(workdir, "non-finite")
    assert events == [
        f"step {step}, task one: no update; examples {', '.join(map(str, ids))}"
        for step, ids in bad.items()
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"non-finite: {event}" in printed for event in events)
    lines = {x["step"]: x for x in deterministic(workdir) if x["kind"] == "train"}
    assert {s for s, x in lines.items() if x["loss"] == "nan"} == set(bad)


def test_non_finite_steps_of_the_only_task_end_the_run(tmp_path: Path) -> None:
    """With others beside it, it is left out: see `test_quarantine.py`."""
    with pytest.raises(UserError) as error:
        run(
            tmp_path / "run",
            f"tasks.one.objective.bad_gradient={tuple(range(40))}",
            "tasks.two.weight=0",
            "limits.max_non_finite_steps=3",
            "log.flush_every=1",
        )
    said = str(error.value)
    assert "Task 'one': 3 steps in a row" in said and "up to step 2" in said
    assert "optimizer.learning_rate" in said


def test_non_finite_steps_that_are_not_in_a_row_are_no_reason(tmp_path: Path) -> None:
    """Example 13 comes once in 5 visits: at most twice in a row, where two epochs meet."""
    run(
        tmp_path / "run",
        "steps=24",
        "tasks.one.objective.bad_loss=(13,)",
        "limits.max_non_finite_steps=3",
    )
    assert toyrun.meta(tmp_path / "run")["clock"]["skipped"]["one"] >= 3


def test_a_rate_that_is_too_high_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no task has had a finite loss and gradient.*learning_rate"
    ):
        run(
            tmp_path / "run",
            "optimizer.learning_rate=1e30",
            "limits.max_non_finite_steps=2",
            "steps=30",
        )
    skipped = _events(tmp_path / "run", "non-finite")
    assert len(skipped) >= 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 30
