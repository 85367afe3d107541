"""The captions that are timed are the same ones, whatever is held of the tokens before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import mains
import numpy as np
import pytest

from benchmarks import captions, run
from benchmarks.captions import cached, uncached
from mmjax.core import config as configs
from mmjax.experiment import make_experiment

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "coca_tiny.py"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_both_ways_write_the_same() -> None:
    experiment = make_experiment(configs.read_file(str(CONFIG)))
    task: Any = experiment.tasks["captions"]
    rng = np.random.default_rng(0)
    inputs = {
        "image": {"pixels": rng.integers(0, 256, (6, 16, 16, 3), np.uint8)},
        "text": {"ids": np.zeros((6, 8), np.int32)},
    }
    with jax.enable_x64(True):
        # Larger than they begin: then the tokens depend on what was before.
        drawn = {
            n: (0.02 if "bias" in n else 0.5) * rng.normal(size=s.shape)
            for n, s in experiment.declaration.specs.items()
        }
        one, other = (
            np.asarray(jax.jit(lambda p, f=f: f(task.objective, experiment.declaration.merge(p), inputs))(drawn))
            for f in (cached, uncached)
        )  # fmt: skip
    np.testing.assert_array_equal(one, other)
    assert one.shape == (6, 8) and len(np.unique(one)) > 3


def test_they_are_timed(tmp_path: Path, emoji_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is called; their results are not compared, as compiling takes long."""
    for way in ("cached", "uncached"):
        monkeypatch.setattr(captions, way, lambda objective, model, inputs: inputs["text"]["ids"])
    words = (f"--config={CONFIG}", "--only=captions", "--pairs=3", f"--out={tmp_path}")
    ended = mains.run(run.main, *words)
    assert (ended.status, ended.err) == (0, "")
    found = json.loads((tmp_path / "captions.json").read_text())["quantities"]
    names = [each["name"] for each in found]
    assert names[:1] == ["captions: uncached to cached"]
    assert {"captions: cached", "captions: uncached"} <= set(names)
    assert all(len(each["values"]) == 3 and min(each["values"]) > 0 for each in found)


def test_the_committed_results_have_the_names_that_are_measured_now() -> None:
    results = json.loads((RESULTS / "captions.json").read_text())
    names = {quantity["name"] for quantity in results["quantities"]}
    ways = ("cached", "uncached", "peer uncached")
    assert names >= {f"captions: {way}" for way in ways}
    assert names >= {f"captions: {way} to cached" for way in ways[1:]}
    assert "anew" not in (RESULTS / "captions.md").read_text()
