"""One device or eight, under any mesh: the same examples, and the same parameters in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 7
CLOSE = 1e-10
ONE = {"one": {}}
EIGHT = {
    "data": {"mesh": {"data": 8}},
    "data fsdp tensor": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "depends": {"mesh": {"data": 8}, "depends": True},
}
# Parts of a batch; how many times the largest parameters are cut.
CUTS = {"data": (8, 1), "data fsdp tensor": (4, 4)}


@pytest.fixture(scope="module")
def out(emoji_dir: Any, environment_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what `elastic.py` wrote, once on one device and once on eight."""
    folder = tmp_path_factory.mktemp("elastic")
    overrides = [f"steps={STEPS}", "evaluation.every=0", "checkpoint.every=0"]
    overrides += [f"tasks.{task}.evaluators={{}}" for task in ("image_text", "masked_image")]
    config = str(ROOT / "tests" / "configs" / "tiny.py")
    for devices, wanted in ((1, ONE), (8, EIGHT)):
        words = [str(ROOT / "tests/pod/elastic.py"), config, str(folder), json.dumps(wanted)]
        done = subprocess.run(
            [sys.executable, *words, *overrides], capture_output=True, text=True, timeout=600,
            env=environment_of(devices, {"JAX_ENABLE_X64": "1"}), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def told(out: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return result


def arrays(out: Path, name: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(out / f"{name}.npz") as file:
        return dict(file)


def difference(out: Path, one: str, other: str) -> dict[str, float]:
    """Return the largest difference in each array of what a checkpoint holds, relative to 1 or its size."""
    a, b = arrays(out, one), arrays(out, other)
    assert a.keys() == b.keys()
    return {n: float(np.max(np.abs(a[n] - b[n]) / np.maximum(1, np.abs(a[n])))) for n in a}


def test_the_runs_were_what_they_are_called(out: Path) -> None:
    """Else the comparisons below compare a run with itself."""
    for name in (*ONE, *EIGHT):
        run = told(out, name)
        assert run["devices"] == (1 if name in ONE else 8)
        assert len(run["batches"]) == STEPS
        assert {task for task, _, _ in run["losses"]} == {"image_text", "masked_image"}
        assert sum(task == "masked_image" for task, _, _ in run["losses"]) >= 2
        held = arrays(out, name)
        floats = {n for n in held if not n.endswith("/count")}
        assert all(held[n].dtype == np.float64 for n in floats)


@pytest.mark.parametrize("name", CUTS)
def test_batches_and_parameters_are_spread_over_the_devices(out: Path, name: str) -> None:
    parts, cut = CUTS[name]
    run = told(out, name)
    assert set(run["parts"]) == {parts}
    cuts = {n: size / local for n, (size, local) in run["shardings"].items()}
    parameters = {n: c for n, c in cuts.items() if n.startswith("parameters/")}
    assert max(parameters.values()) == cut
    if cut > 1:
        assert sum(c > 1 for c in parameters.values()) > len(parameters) / 2
    for name, times in parameters.items():
        leaf = name.removeprefix("parameters/")
        assert cuts[f"optimizer/{leaf}/mu"] == cuts[f"optimizer/{leaf}/nu"] == times
    assert {s[1] for s in told(out, "one")["shardings"].values()} == {
        s[0] for s in told(out, "one")["shardings"].values()
    }


@pytest.mark.parametrize("name", EIGHT)
def test_the_same_examples_in_the_same_order(out: Path, name: str) -> None:
    """Every bit of every batch: ids, pixels, tokens."""
    assert told(out, name)["batches"] == told(out, "one")["batches"]
    assert len(set(told(out, name)["batches"])) == STEPS


@pytest.mark.parametrize("name", CUTS)
def test_the_same_parameters_and_losses(out: Path, name: str) -> None:
    differences = difference(out, "one", name)
    assert max(differences.values()) < CLOSE, sorted(differences.items(), key=lambda x: -x[1])[:5]
    one, other = (told(out, n)["losses"] for n in ("one", name))
    assert [x[0] for x in one] == [x[0] for x in other]
    np.testing.assert_allclose([x[1:] for x in other], [x[1:] for x in one], rtol=CLOSE, atol=CLOSE)


def test_the_parameters_moved(out: Path) -> None:
    """By about a learning rate a step: eight orders of magnitude over what is tolerated."""
    held = arrays(out, "one")
    names = [n.removeprefix("initial/") for n in held if n.startswith("initial/")]
    moved = {n: np.abs(held[f"parameters/{n}"] - held[f"initial/{n}"]).max() for n in names}
    still = {n for n, by in moved.items() if by < 1e-4}
    assert not still, still
    assert {n.split("/")[0] for n in names} == {"stems", "trunk", "heads"}


def test_random_keys_that_depended_on_the_devices_would_be_seen(out: Path) -> None:
    """The control: masks drawn otherwise on eight devices than on one."""
    differences = difference(out, "one", "depends")
    seen = {n: d for n, d in differences.items() if d > 1e3 * CLOSE}
    assert any(n.startswith("parameters/trunk") for n in seen)
    assert any(n.startswith("parameters/heads/masked_image") for n in seen)
