"""The TPU's own compiler takes the kernels, under a mesh, forward and backward. Nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmjax.plan.topology import environment

Found = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, environment_of: Callable[..., dict[str, str]]
) -> Found:
    file = tmp_path_factory.mktemp("kernels") / "found.json"
    words = [sys.executable, str(Path(__file__).with_name("kernels.py")), str(file)]
    env = {**environment_of(1), **environment(), "PYTHONPATH": environment_of(1)["PYTHONPATH"]}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result: Found = json.loads(file.read_text())
    return result


def test_long_attention_is_splashs_on_each_device(found: Found) -> None:
    """Forward, and for queries and for keys and values; rows and heads stay where they are."""
    assert found["splash"] == {"kernels": 3, "gathers": 0}


def test_asked_for_the_chunked_form_no_kernel_is_called(found: Found) -> None:
    """The control."""
    assert found["chunked"]["kernels"] == 0


def test_grouped_products_are_megablox(found: Found) -> None:
    """Forward, by the rows and by the matrices."""
    assert found["megablox"]["kernels"] == 3
