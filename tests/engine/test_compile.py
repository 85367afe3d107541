"""Programs: compiled before the first step, limited, and kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath
from jax.sharding import Mesh
from toyrun import Parts, block, host, parts, run, watched

from mmjax.core.errors import UserError
from mmjax.core.sharding import make_mesh
from mmjax.engine.compile import LimitsConfig, Program, Request, compile_all, use_cache
from mmjax.engine.requests import eval_requests, train_requests
from mmjax.experiment import make_experiment


@pytest.fixture(scope="module")
def toy() -> Parts:
    return parts()


@pytest.fixture(scope="module")
def programs(toy: Parts) -> dict[str, Program]:
    requests = train_requests(toy.experiment, toy.mesh) | eval_requests(toy.experiment, toy.mesh)
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
    request = train_requests(wide.experiment, wide.mesh)["one"]
    state = sum(x.nbytes for x in jax.tree.leaves(wide.state))
    programs = compile_all({"one": request}, wide.mesh, LimitsConfig())
    assert state < programs["one"].report["bytes"] < 2.2 * state


def test_what_does_not_fit_is_refused_by_name(toy: Parts, programs: Mapping[str, Program]) -> None:
    requests = train_requests(toy.experiment, toy.mesh)
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


def test_the_second_compilation_is_a_hit(tmp_path: Path) -> None:
    with _cache(tmp_path / "cache"):
        cached = [_one_anew().report["cached"] for _ in range(2)]
    assert cached == [False, True]


@pytest.mark.parametrize("unit", ["steps", "examples", "visits"])
def test_a_run_of_another_length_has_the_same_programs(unit: str) -> None:
    """To the letter, whatever its length, its warm-up and its phases' rates; another peak is another program."""
    phase = 'schedule.phases=[{"start": 8, "learning_rate": %s}]'

    def texts(*overrides: str) -> dict[str, str]:
        words = ("optimizer.decay=cosine", f"optimizer.unit={unit}", *overrides)
        mesh, requests = _train_requests(*words)
        texts = {}
        for name, r in requests.items():
            jitted = jax.jit(r.function, donate_argnums=r.donate, out_shardings=r.out_shardings)
            with jax.set_mesh(mesh):
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
    """Return the program of a task, traced again."""
    mesh, requests = _train_requests("model.width=4", *overrides)
    return compile_all({"one": requests["one"]}, mesh, LimitsConfig())["one"]


def _train_requests(*overrides: str) -> tuple[Mesh, dict[str, Request]]:
    """Return the training programs of a new experiment on one device; nothing is compiled for them."""
    experiment = make_experiment(block(*overrides))
    mesh = make_mesh(experiment.run.mesh, jax.devices()[:1])
    return mesh, train_requests(experiment, mesh)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_a_cache_torn_by_a_kill_does_no_harm(tmp_path: Path) -> None:
    """Entries cut short are compiled again, to a program that gives the same bits."""
    results, toy = [], parts("model.width=4")
    batch, when, before = toy.batch("one", range(8)), toy.ticks("one", 3, 2), host(toy.state)
    places = jax.tree.map(lambda x: x.sharding, toy.state)
    with _cache(tmp_path / "cache"):
        for _ in range(2):
            state = jax.device_put(before, places)
            results.append(host(_one_anew().call(state, batch, when)))
            entries = [p for p in (tmp_path / "cache").rglob("*-cache") if p.is_file()]
            assert entries
            for entry in entries:
                entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert _equal(*results)


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Yield another folder for compiled programs, empty at first; nothing is taken from memory."""
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


def _equal(one: Any, two: Any) -> bool:
    """Return whether two trees of arrays hold the same bits (NaN equals NaN)."""
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), one, two)
    return all(jax.tree.leaves(same))
