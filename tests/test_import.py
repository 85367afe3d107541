"""`import mmjax` is light, and nothing asks for TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).resolve().parent / "configs" / "tiny.py"
ROOT = TINY.parent.parent.parent

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"}
FLAGS = {"absl", "argparse", "ml_collections"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` in a fresh process."""
    code += "\nimport sys, json; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_is_light():
    loaded = loaded_by("import mmjax; assert mmjax.__version__ and callable(mmjax.load)")
    assert not loaded & (HEAVY | FLAGS | {"numpy", "etils"})


@pytest.mark.parametrize(
    "module", ["mmjax.core.errors", "mmjax.core.config", "mmjax.data", "mmjax.cli"]
)
def test_what_needs_no_arrays_loads_none(module):
    assert not loaded_by(f"import {module}") & HEAVY


def test_loading_a_run_reads_no_data_set(tiny_run):
    code = f"import mmjax; mmjax.load({str(tiny_run)!r}).embed(text=['dog'])"
    assert not loaded_by(code) & {"tensorflow", "tensorflow_datasets", "torch"}


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A folder with a `tensorflow` that notes who asks for it, and is none."""
    package = tmp_path / "decoy" / "tensorflow"
    package.mkdir(parents=True)
    asked = str(tmp_path / "asked")
    (package / "__init__.py").write_text(
        "import traceback\n"
        f"open({asked!r}, 'a').write(''.join(traceback.format_stack()[-12:]))\n"
        "raise ImportError('no TensorFlow')\n"
    )
    return package.parent


def test_a_whole_training_never_asks_for_tensorflow(tiny_run, decoy, tmp_path, command: Any):
    """The very config of `tiny_run`: what it compiles is in the cache."""
    workdir = tmp_path / "run"
    path = f"{decoy}:{ROOT}"
    done = command("train", f"--config={TINY}", f"--workdir={workdir}", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    asked = tmp_path / "asked"
    assert not asked.exists(), asked.read_text()
    assert (workdir / "results.json").read_text() == (tiny_run / "results.json").read_text()


def test_the_decoy_would_note_it(decoy, tmp_path):
    asking = "try:\n  import tensorflow\nexcept ImportError:\n  pass"
    loaded_by(f"import sys; sys.path.insert(0, {str(decoy)!r})\n{asking}")
    assert (tmp_path / "asked").exists()
