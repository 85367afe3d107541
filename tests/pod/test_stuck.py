"""A loader, a step or a save that hangs or dies: the run ends with a message, and resumes from its checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import toyrun
from harness import deterministic, finished_steps, log
from toyrun import run

from mmjax.engine.watchdog import STUCK

HERE = Path(__file__).resolve().parent
LIMIT = 4

# Exit status, words on standard error, checkpoints that must be there.
ENDS: dict[str, tuple[int, list[str]]] = {
    "stuck_source": (STUCK, ["stuck: nothing has moved", "waiting for data, step", "in _forever"]),
    "stuck_step": (STUCK, ["stuck: nothing has moved", "in a step, step", "in _forever"]),
    "stuck_save": (STUCK, ["stuck: nothing has moved", "saving, step 4", "in _forever"]),
    "exiting_source": (2, ["A thread of the loader died while it made step", "SystemExit(0)"]),
    "killed_threads": (2, ["A thread of the loader died while it made step", "SystemExit"]),
}
Faulty = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def faulty(environment_of: Callable[..., dict[str, str]]) -> Faulty:
    """Return `faulty(fault, workdir, *overrides)`: a run of the toy config in which something goes wrong."""

    def start(fault: str, workdir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
        extra, config = HERE.parent / "extra", HERE.parent / "configs" / "toy.py"
        words = [f"--extra={extra}", f"--config={config}", f"--workdir={workdir}", *overrides]
        return subprocess.run(
            [sys.executable, str(HERE / "faulty.py"), fault, *words], capture_output=True, text=True,
            env=environment_of(1), timeout=300, check=False,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(workdir)
    return workdir


def same(workdir: Path, other: Path) -> None:
    assert toyrun.bits(workdir) == toyrun.bits(other)
    assert deterministic(workdir) == deterministic(other)
    assert (workdir / "results.json").read_bytes() == (other / "results.json").read_bytes()


@pytest.mark.parametrize("fault", ENDS)
def test_what_hangs_or_dies_ends_the_run_with_words_and_it_goes_on(
    fault: str, faulty: Faulty, straight: Path, tmp_path: Path
) -> None:
    status, words = ENDS[fault]
    ended = faulty(fault, tmp_path / "run", f"--config.limits.watchdog_seconds={LIMIT}")
    assert ended.returncode == status, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
    events = [x["text"] for x in log(tmp_path / "run") if x["line"] == "event"]
    assert (status == STUCK) == any("nothing has moved" in text for text in events)
    assert not (tmp_path / "run" / "results.json").exists()
    assert 12 not in finished_steps(tmp_path / "run")
    run(tmp_path / "run")
    same(tmp_path / "run", straight)


@pytest.mark.parametrize("how", ["slow_source", "jumping_clock"])
def test_what_only_looks_wrong_changes_nothing(
    how: str, faulty: Faulty, straight: Path, tmp_path: Path
) -> None:
    """A run of several times the limit in all; and stamps that go back by years."""
    more = [
        "--config.limits.watchdog_seconds=2",
        "--config.loader.threads=1",
        "--config.loader.prefetch=1",
    ]
    ended = faulty(how, tmp_path / "run", *(more if how == "slow_source" else []))
    assert ended.returncode == 0, ended.stderr
    stamps = [x["time"] for x in log(tmp_path / "run")]
    assert (stamps != sorted(stamps)) == (how == "jumping_clock")
    seconds = [x["seconds"] for x in log(tmp_path / "run")]
    assert seconds == sorted(seconds) and seconds[-1] < 1e5
    if how == "slow_source":
        saved, original = (toyrun.meta(w)["config"] for w in (tmp_path / "run", straight))
        assert (
            saved.pop("limits") == {"watchdog_seconds": 2}
            and saved.pop("loader")
            and saved == original
        )
        assert deterministic(tmp_path / "run") == deterministic(straight)
    else:
        same(tmp_path / "run", straight)
