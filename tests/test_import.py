"""`import mmjax` is light, and nothing asks for TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from decoy import make

ROOT = Path(__file__).resolve().parent.parent

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow"}
FLAGS = {"absl", "argparse", "ml_collections"}


def loaded_by(code: str) -> set[str]:
    """Return top-level modules that are loaded after `code` in a fresh process."""
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


def test_a_whole_training_never_asks_for_tensorflow(tiny_run):
    """`tiny_run` was made with a decoy on its path."""
    assert (tiny_run.parent / "decoy" / "tensorflow" / "__init__.py").exists()
    asked = tiny_run.parent / "asked"
    assert not asked.exists(), asked.read_text()
    assert (tiny_run / "results.json").exists()


def test_the_decoy_would_note_it(tmp_path):
    decoy = make(tmp_path)
    asking = "try:\n  import tensorflow\nexcept ImportError:\n  pass"
    loaded_by(f"import sys; sys.path.insert(0, {str(decoy)!r})\n{asking}")
    assert (tmp_path / "asked").exists()
