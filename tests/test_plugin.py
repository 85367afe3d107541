"""A modality, a layer, a router, an optimizer's algorithm, an objective, an evaluator, a source and a config.

Each is one file in `docs/examples/`, a folder that is given with `--extra`. If this test needs a change
elsewhere in mmjax before they run, adding one touches more than its own file, and the design has failed there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from mains import Ended, apart

from mmjax.engine import checkpoint

EXTRA = Path(__file__).resolve().parents[1] / "docs" / "examples"  # shown in docs/extending.md


@pytest.fixture(scope="module")
def extra() -> Path:
    return EXTRA


SHIFT = {"name": "shift", "scal": 3}
ROUTED = {
    "name": "transformer",
    "num_heads": 2,
    "mlp_dim": 4,
    "experts": {"count": 3, "router": {"name": "in_turn", "frst": 1}},
}
# Keys that are not there: what the command line sets, and what the error contains.
WRONG = {
    "rule": ("schedule.rule=blok", "unknown schedule rule 'blok'. Did you mean 'block'?"),
    "algorithm": (
        "optimizer.algorithm.momentun=0.9",
        "Unknown config key 'config.optimizer.algorithm.momentun'. Did you mean 'momentum'?",
    ),
    "layer": (
        f"model.layers={[{'repeat': 1, 'blocks': [SHIFT]}]}",
        "blocks[0].scal'. Did you mean 'scale'?",
    ),
    "router": (
        f"model.layers={[{'repeat': 1, 'blocks': [ROUTED]}]}",
        "blocks[0].experts.router.frst'. Did you mean 'first'?",
    ),
}  # fmt: skip


STEADY = (
    "--config.tasks.pitch.objective={'name': 'steady'}",
    "--config.tasks.pitch.evaluators={}",
    "--config.model.teachers={'average': {'of': ['stems/.*', 'trunk/.*'], 'decay': 0.5}}",
    "--config.steps=4",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the run that `ended` makes."""
    return tmp_path_factory.mktemp("tones") / "run"


@pytest.fixture(scope="module")
def ended(extra: Path, run: Path, environment_of: Any) -> dict[str, Ended]:
    """How mains with the folder ended, all in one process."""
    config = [f"--extra={extra}", f"--config={extra}/tones.py"]
    commands = {
        "train": ["train", *config, f"--workdir={run}"],
        "steady": ["train", *config, f"--workdir={run}3", *STEADY],
        "block": ["train", *config, f"--workdir={run}2", "--config.schedule.rule=block", "--dry_run"],
        "evaluate": ["evaluate", f"--extra={extra}", f"--workdir={run}"],
    }  # fmt: skip
    for name, (override, _) in WRONG.items():
        commands[name] = ["show", *config, f"--config.{override}"]
    return apart(environment_of(1), commands)


@pytest.fixture(scope="module")
def without(ended: Any, run: Path, environment_of: Any) -> dict[str, Ended]:
    """How mains ended in a process that was not given the folder."""
    commands = {"evaluate": ["evaluate", f"--workdir={run}"], "show": ["show", str(run)]}
    return apart(environment_of(1), commands)


def test_it_trains(run, ended):
    assert ended["train"].status == 0, ended["train"].err
    assert "semitones^2" in ended["train"].out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
    [record] = json.loads((run / "results.json").read_text())
    assert record["name"] == "error" and record["task"] == "pitch" and record["better"] == "lower"
    assert "error (lower" in ended["train"].out
    chips = re.findall(
        r'class="(chip[ good]*)">[^<]* % (lower|higher)', (run / "report.html").read_text()
    )
    is_lower = record["value"] < record["chance"]
    assert set(chips) == {("chip good", "lower") if is_lower else ("chip", "higher")}
    assert record["split"] == "32 tones" and record["count"] == 32
    assert record["chance"] == np.var(np.arange(32) % 4)
    folder = epath.Path(run)
    state = checkpoint.read_shapes(folder, 30)["optimizer"]
    assert {field for leaf in state.values() for field in leaf} == {"trace"}
    assert "code.algorithms/heavy_ball" in checkpoint.read_meta(folder, 30)["identities"]


def test_its_objective_may_read_a_teacher(run, ended):
    assert ended["steady"].status == 0, ended["steady"].err
    shapes = checkpoint.read_shapes(epath.Path(f"{run}3"), 4)
    copied = {n for n in shapes["parameters"] if n.startswith(("stems/", "trunk/"))}
    assert set(shapes["buffers"]) == {f"teacher/average/{n}" for n in copied}


def test_its_rule_of_the_schedule_is_used(ended):
    assert ended["block"].status == 0, ended["block"].err
    assert " block " in ended["block"].out


@pytest.mark.parametrize("name", WRONG)
def test_its_names_and_the_keys_of_its_blocks_are_checked(ended, name):
    assert ended[name].status == 2 and WRONG[name][1] in ended[name].err


def test_it_is_evaluated_and_shown(run, ended, without):
    assert (ended["evaluate"].status, ended["evaluate"].err) == (0, "")
    [record] = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    del record["time"], record["command"]
    assert [record] == json.loads((run / "results.json").read_text())
    assert (without["show"].status, without["show"].err) == (0, "")
    shown = without["show"].out.splitlines()
    trunk = next(line.split() for line in shown if line.startswith("trunk"))
    sparse = 4 * 8 * 8 + 2 * 8 + 3 * 8 + 3 * 2 * 4 * 8  # attention, norms, router, experts
    assert int(trunk[1]) == 2 * 8 * 8 + sparse + 2 * 8


def test_it_embeds(run, extra, ended):
    code = f"""
import numpy as np, mmjax
from mmjax.core import config
config.add_folder({str(extra)!r})
model = mmjax.load({str(run)!r})
vectors = model.embed(tone=[np.sin(np.arange(8)), [0.0] * 8])
assert vectors.shape == (2, 8), vectors.shape
assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
try:
    model.embed(tone=[np.zeros((2, 2))])
except mmjax.core.errors.UserError as error:
    assert "tone[0]: a tone has shape [N], found [2, 2]" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_folder_the_name_is_unknown(without):
    assert without["evaluate"].status == 2
    said = without["evaluate"].err
    assert "optimizer.algorithm.name: no 'heavy_ball' in mmjax/optim/algorithms" in said
    assert "--extra" in said
