"""Profiles: the files that they name, and a run that ends in the same bits."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import toyrun
from bucket import bucket
from harness import deterministic
from toyrun import run

from mmjax.core.config import key_class
from mmjax.core.errors import UserError
from mmjax.engine.profiling import Profile, ProfileConfig
from mmjax.run_config import RunConfig


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(workdir)
    return workdir


def traced_steps(workdir: Path) -> list[int]:
    """Return the steps that the traces hold, by their annotations."""
    found = []
    for path in sorted(workdir.glob("profile/plugins/profile/*/*.trace.json.gz")):
        events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found += [int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})]
    return sorted(found)


def test_a_trace_holds_the_steps_it_was_asked_for(tmp_path: Path, straight: Path) -> None:
    run(tmp_path / "run", "profile.start=5", "profile.steps=4")
    assert traced_steps(tmp_path / "run") == [5, 6, 7, 8]
    assert list((tmp_path / "run").glob("profile/plugins/profile/*/*.xplane.pb"))
    # To look is not to touch.
    assert deterministic(tmp_path / "run") == deterministic(straight)
    assert toyrun.parameters(tmp_path / "run").keys() == toyrun.parameters(straight).keys()
    arrays = zip(
        *(toyrun.parameters(w).values() for w in (tmp_path / "run", straight)), strict=True
    )
    assert all((one == two).all() for one, two in arrays)


def test_a_trace_ends_with_the_run_and_begins_where_it_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "run", "steps=4")
    run(tmp_path / "run", "steps=6", "profile.start=2", "profile.steps=100")
    assert traced_steps(tmp_path / "run") == [4, 5]


def test_what_was_compiled(tmp_path: Path, straight: Path) -> None:
    run(tmp_path / "run", "profile.dumps=True", "steps=1", "tasks.two.weight=0")
    folder = tmp_path / "run" / "dumps"
    # Of the training programs only that of the task that runs.
    stems = ["00_one", "01_one_loss", "02_two_loss"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*(f"{s}.hlo.txt" for s in stems), *(f"{s}.json" for s in stems), "memory.prof"]
    )
    for stem in stems:
        assert (folder / f"{stem}.hlo.txt").read_text().startswith("HloModule")
        facts = json.loads((folder / f"{stem}.json").read_text())
        memory = facts["memory"]
        assert facts["bytes"] == sum(memory.values()) - 2 * memory["alias"]
        assert facts["flops"] > 0 and facts["program"]
    assert gzip.decompress((folder / "memory.prof").read_bytes())
    assert not (straight / "dumps").exists() and not (straight / "profile").exists()


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]
    yield number


def test_a_profiler_finds_the_port_while_the_run_goes_on(tmp_path: Path, port: int) -> None:
    def listens() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex(("127.0.0.1", port)) == 0

    with Profile(ProfileConfig(port=port), tmp_path):  # type: ignore[arg-type]
        assert listens()
    assert not listens()


def test_a_run_opens_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(jax.profiler, "start_server", seen.append)
    monkeypatch.setattr(jax.profiler, "stop_server", lambda: seen.append("stopped"))
    run(tmp_path / "run", "profile.port=9012", "steps=1")
    assert seen == [9012, "stopped"]


def test_profiles_are_free_keys_and_checked(tmp_path: Path) -> None:
    assert key_class("profile.steps", RunConfig) == "free"
    with pytest.raises(UserError, match="config.profile.steps is -1"):
        run(tmp_path / "run", "profile.steps=-1")
    with pytest.raises(UserError, match="local --workdir"):
        Profile(ProfileConfig(dumps=True), bucket())
