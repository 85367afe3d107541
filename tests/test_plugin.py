"""A modality, a layer, a router, an optimizer's algorithm, an objective, an evaluator, a source and a config.

Each is one file in `docs/examples/`, a folder that is given with `--extra`. If this test needs a change
elsewhere in mmjax before they run, adding one touches more than its own file, and the design has failed there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from mmjax.engine import checkpoint

EXTRA = Path(__file__).resolve().parents[1] / "docs" / "examples"  # shown in docs/extending.md


@pytest.fixture(scope="module")
def extra() -> Path:
    return EXTRA


@pytest.fixture(scope="module")
def run(extra: Path, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("tones") / "run"
    done = command(
        "train", f"--extra={extra}", f"--config={extra}/tones.py", f"--workdir={workdir}"
    )
    assert done.returncode == 0, done.stderr
    assert "squared semitones" in done.stdout
    return workdir


def test_it_trains(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
    [record] = json.loads((run / "results.json").read_text())
    assert record["name"] == "error" and record["task"] == "pitch"
    assert record["split"] == "32 tones" and record["count"] == 32
    assert record["chance"] == np.var(np.arange(32) % 4)
    folder = epath.Path(run)
    state = checkpoint.read_shapes(folder, 30)["optimizer"]
    assert {field for leaf in state.values() for field in leaf} == {"trace"}
    assert "code.algorithms/heavy_ball" in checkpoint.read_meta(folder, 30)["identities"]


def test_its_rule_of_the_schedule_is_used(extra, command, tmp_path):
    words = [f"--extra={extra}", f"--config={extra}/tones.py", f"--workdir={tmp_path}"]
    words += ["--config.schedule.rule=block", "--dry_run"]
    done = command("train", *words)
    assert done.returncode == 0, done.stderr
    assert " block " in done.stdout
    done = command("train", *[w.replace("=block", "=blok") for w in words])
    assert (
        done.returncode == 2
        and "unknown schedule rule 'blok'. Did you mean 'block'?" in done.stderr
    )


def test_the_keys_of_its_algorithm_are_checked(extra, command):
    words = [f"--extra={extra}", f"--config={extra}/tones.py"]
    done = command("show", *words, "--config.optimizer.algorithm.momentun=0.9")
    said = "Unknown config key 'config.optimizer.algorithm.momentun'. Did you mean 'momentum'?"
    assert done.returncode == 2 and said in done.stderr


def test_it_is_evaluated_and_shown(run, extra, command):
    own = (run / "results.json").read_text()
    done = command("evaluate", f"--extra={extra}", f"--workdir={run}")
    assert (done.returncode, done.stderr) == (0, "")
    [record] = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    del record["time"], record["command"]
    assert [record] == json.loads(own) and (run / "results.json").read_text() == own
    done = command("show", str(run))
    assert (done.returncode, done.stderr) == (0, "")
    trunk = next(line.split() for line in done.stdout.splitlines() if line.startswith("trunk"))
    sparse = 4 * 8 * 8 + 2 * 8 + 3 * 8 + 3 * 2 * 4 * 8  # attention, norms, router, experts
    assert int(trunk[1]) == 2 * 8 * 8 + sparse + 2 * 8


def test_it_embeds(run, extra, command):
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


def test_without_the_folder_the_name_is_unknown(run, extra, command):
    done = command("evaluate", f"--workdir={run}")
    assert done.returncode == 2
    assert "optimizer.algorithm.name: no 'heavy_ball' in mmjax/optim/algorithms" in done.stderr
    assert "--extra" in done.stderr


EXPERTS = {"count": 3, "router": {"name": "in_turn", "frst": 1}}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"name": "shift", "scal": 3}, "blocks[0].scal'. Did you mean 'scale'?"),
        (
            {"name": "transformer", "num_heads": 2, "mlp_dim": 4, "experts": EXPERTS},
            "blocks[0].experts.router.frst'. Did you mean 'first'?",
        ),
    ],
    ids=["layer", "router"],
)
def test_the_keys_of_a_layer_and_of_a_router_are_checked_too(extra, command, block, said):
    groups = [{"repeat": 1, "blocks": [block]}]
    words = [f"--extra={extra}", f"--config={extra}/tones.py", f"--config.model.layers={groups}"]
    done = command("show", *words)
    assert done.returncode == 2 and said in done.stderr
