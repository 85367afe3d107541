"""`python -m tests.pod.matrix`: the table of systems on meshes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from matrix import CASES, SETTINGS, Row, table
from sharded import CLOSE, ROOT

TOY = "tests/configs/toy.py"
MESHES = ("data 8", "data 2 fsdp 2 tensor 2")


def test_a_tiny_config_on_two_meshes(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    words = [
        f"--systems={TOY}",
        f"--meshes={','.join(MESHES)}",
        "--extra=tests/extra",
        f"--out={out}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pod.matrix", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert f"| mesh | {TOY} (2) |" in page
    for mesh in MESHES:
        cell = re.search(rf"^\| {mesh} \| (\S+) \|$", page, flags=re.MULTILINE)
        assert cell and 0 < float(cell[1]) < CLOSE
    assert f"python -m tests.pod.matrix --systems={TOY}" in page
    assert re.search(r"Commit \w+.*; Python 3\.\d+\.\d+; jax \d+\.\d+", page)
    assert f"Not run here: systems {', '.join(SETTINGS)}; meshes fsdp 8," in page


def test_a_difference_and_an_array_made_whole_are_shown() -> None:
    rows = [
        Row("right", 1, {"data 8": 1e-15, "fsdp 8": 2e-11}, frozenset()),
        Row("other", 2, {"data 8": 0.5, "fsdp 8": 0.0}, frozenset()),
        Row("whole", 3, {"data 8": 0.0, "fsdp 8": 3e-16}, frozenset({"fsdp 8"})),
    ]
    assert [r.is_right for r in rows] == [True, False, False]
    page = table(rows, ["data 8", "fsdp 8"], "command").splitlines()
    assert "| mesh | right (1) | other (2) | whole (3) |" in page
    assert "| data 8 | 1e-15 | 5e-01 | 0e+00 |" in page
    assert "| fsdp 8 | 2e-11 | 0e+00 | 3e-16* |" in page


def test_all_systems_on_all_meshes_are_the_default() -> None:
    """A new system needs a setting; those of Mixture-of-Transformers are MoMa's layers."""
    systems = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert systems - {"mot"} == set(SETTINGS)
    assert "Not run here" not in table(
        [Row(name, 1, dict.fromkeys(CASES, 0.0), frozenset()) for name in SETTINGS], list(CASES), ""
    )
