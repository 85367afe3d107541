"""The commands of the page from laptop to pod: dry runs as they stand, those of this machine on the toy config."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "launch" / "README.md").read_text()
COMMANDS = re.findall(r"(?<=\n    )\S.*", PAGE.replace("\\\n      ", ""))
TOY = ["--extra=tests/extra", "--config=tests/configs/toy.py"]


def words_of(command: str) -> list[str]:
    return shlex.split(command)


def test_the_page_has_commands_of_every_launcher() -> None:
    scripts = {w for c in COMMANDS for w in words_of(c) if w.startswith("launch/")}
    assert scripts == {f"launch/{n}.sh" for n in ("quickstart", "local_pod", "tpu", "gke", "slurm")}


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if "--dry_run" in c], ids=lambda c: words_of(c)[1]
)
def test_dry_runs_print_what_would_run(command: str) -> None:
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(words_of(command), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "-m mmjax train" in done.stdout, done.stderr


def test_the_pods_commands_train_show_and_go_on_with_fewer(tmp_path: Path) -> None:
    """As the page has them, on the toy config."""
    pods = [words_of(c) for c in COMMANDS if "local_pod.sh" in c]
    show = next(words_of(c) for c in COMMANDS if c.startswith("mmjax show"))
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)
    workdir = str(tmp_path / "run")
    for words, steps in zip(pods, (4, 6), strict=True):
        kept = [w for w in words if not w.startswith(("--config", "--workdir"))]
        made = [*kept, *TOY, f"--workdir={workdir}", f"--config.steps={steps}"]
        done = subprocess.run(made, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert "Resuming from step 4" in done.stdout and "processes 4 -> 2" in done.stdout
    shown = [sys.executable, "-m", *show[:-1], workdir]
    done = subprocess.run(shown, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
