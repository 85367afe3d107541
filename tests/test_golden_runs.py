"""Runs that earlier versions wrote are loaded, evaluated and resumed, with the results that these versions had."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))

import runs  # noqa: E402
import toyrun  # noqa: E402

from mmjax import evaluate  # noqa: E402

# One of 64 ranks may change with the processor; a loss may not.
RANK = 1 / 64 + 1e-6


@dataclass(frozen=True)
class Found:
    """A golden run unpacked: its folder, its name, and what its version found."""

    workdir: Path
    name: str
    expected: Mapping[str, Any]


@pytest.fixture(
    scope="module", params=sorted(GOLDEN.glob("*/*.zip")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def golden(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, emoji_dir: epath.Path
) -> Found:
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(request.param) as file:
        file.extractall(folder)
    toyrun.block()
    expected = json.loads((folder / "expected.json").read_text())
    return Found(folder / "run", request.param.stem, expected)


def assert_sums(workdir: Path, expected: Mapping[str, Sequence[float]], tolerance: float) -> None:
    """Check sums: squares differ by rounding alone; a sum may cancel, so it is held to the parameter's norm."""
    found = runs.sums(workdir)
    assert found.keys() == expected.keys()
    for name, (total, squares) in expected.items():
        norm = np.sqrt(squares) + 1e-6
        assert abs(found[name][0] - total) <= 10 * tolerance * norm, name
        assert abs(np.sqrt(found[name][1]) - np.sqrt(squares)) <= tolerance * norm, name


def assert_records(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]], tolerance: float
) -> None:
    def key(record: Mapping[str, Any]) -> tuple[str, str, str]:
        return record["task"], record["name"], record["split"]

    values = {key(r): r for r in found}
    assert list(values) == [key(r) for r in expected]
    for record in expected:
        result, count = values[key(record)], values[key(record)]["count"]
        # Held-out losses of that version held the auxiliary losses.
        value = result["value"] + result.get("auxiliary", 0.0)
        assert count == record["count"], record
        allowed = RANK if 0 <= record["value"] <= 1 else tolerance * abs(record["value"])
        assert abs(value - record["value"]) <= allowed, (record, value)


def test_the_golden_runs_are_there() -> None:
    assert {p.stem for p in (GOLDEN / "c995adf").glob("*.zip")} == set(runs.RUNS)


def test_it_is_loaded(golden: Found) -> None:
    assert_sums(golden.workdir, golden.expected["sums"], 1e-6)
    expected = golden.expected["vectors"]
    np.testing.assert_allclose(runs.vectors(golden.workdir), expected, rtol=0, atol=1e-4)


def test_it_is_evaluated(golden: Found) -> None:
    found = evaluate.evaluate(epath.Path(golden.workdir), None, [])
    assert_records(found, golden.expected["records"], 1e-4)


def test_it_is_resumed_to_the_end_that_it_had(golden: Found, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(golden.workdir, workdir)
    records = toyrun.run(workdir, config=toyrun.meta(workdir)["config"])
    assert records is not None
    assert_sums(workdir, golden.expected["end"]["sums"], 1e-4)
    assert_records(records, golden.expected["end"]["records"], 1e-3)
