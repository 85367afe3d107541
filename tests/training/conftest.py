"""Runs of the toy config to resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import finished_steps
from toyrun import run


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of 12 steps, undisturbed, with checkpoints 4, 8 and 12; copy it, do not change it."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(workdir)
    assert finished_steps(workdir) == (4, 8, 12)
    return workdir


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


@pytest.fixture
def half(copy: Path) -> Path:
    """Return the run as it stood after 8 of its 12 steps."""
    shutil.rmtree(copy / "checkpoints" / "12")
    (copy / "results.json").unlink()
    return copy
