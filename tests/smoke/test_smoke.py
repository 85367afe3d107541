"""The main job end to end, with numbers and one kill: what also runs on the newest supported Python."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from harness import Aim, Harness, deterministic, log

from mmjax import show
from mmjax.core import config as configs
from mmjax.core.parameters import digest
from mmjax.data import order
from mmjax.engine import checkpoint
from mmjax.engine.loader import make_batch
from mmjax.engine.state import Clock
from mmjax.experiment import Experiment, make_experiment

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.py"
TASKS = ("image_text", "masked_image")


@pytest.fixture(scope="module")
def lines(tiny_run: epath.Path) -> list[dict[str, Any]]:
    return deterministic(Path(tiny_run))


@pytest.fixture(scope="module")
def results(tiny_run: epath.Path) -> list[dict[str, Any]]:
    return list(json.loads((tiny_run / "results.json").read_text()))


@pytest.fixture(scope="module")
def experiment(emoji_dir: epath.Path) -> Experiment:
    return make_experiment(configs.read_file(str(CONFIG)))


def losses(lines: list[dict[str, Any]], task: str, field: str = "loss") -> list[float]:
    return [x[field] for x in lines if (x["kind"], x["task"]) == ("train", task)]


# --- numbers -----------------------------------------------------------------------------------


def test_every_step_is_there_and_finite(lines: list[dict[str, Any]]) -> None:
    steps = [x for x in lines if x["kind"] == "train"]
    assert [x["step"] for x in steps] == list(range(14))
    assert {x["task"] for x in steps} == set(TASKS)
    for line in steps:
        assert np.isfinite([line["loss"], line["grad_norm"]]).all() and line["grad_norm"] > 0


def test_the_losses_begin_where_they_should_and_fall(lines: list[dict[str, Any]]) -> None:
    contrastive, masked = losses(lines, "image_text"), losses(lines, "masked_image")
    baseline = losses(lines, "image_text", "baseline")
    # Equal logits would cost log 16. Fresh embeddings know no better, and logits of a spread up to
    # 1 / 0.07 / sqrt(16), as those of random unit vectors have, cost up to some 4 more.
    assert baseline == pytest.approx([math.log(16)] * len(baseline))
    assert -0.2 < contrastive[0] - math.log(16) < 4
    # Fresh predictions of variance near 1 add about 1 to what predicting the mean would cost.
    assert 0.5 < masked[0] - losses(lines, "masked_image", "baseline")[0] < 1.5
    for found in (contrastive, masked):
        assert np.mean(found[-2:]) < np.mean(found[:2]) - 0.1


def test_the_first_loss_is_its_equation(
    lines: list[dict[str, Any]], experiment: Experiment
) -> None:
    """Data, order, tokens and loss of step 0, with the logits put together by hand."""
    task = experiment.tasks["image_text"]
    data = task.source.open()
    ids = order.example_ids(0, "image_text", 0, task.batch, len(data))
    rows, _ = make_batch(
        task.rows(), data, list(ids), lambda i: order.rng(0, "image_text", i), task.batch
    )
    declaration = experiment.declaration
    parameters = jax.jit(lambda: declaration.initialise(0))()

    def embed(parameters: Any, rows: Any) -> Any:
        model = declaration.merge(parameters)
        return [task.objective.embed(model, m, rows.inputs[m]) for m in ("image", "text")]

    image, text = (np.asarray(x, np.float64) for x in jax.jit(embed)(parameters, rows))
    np.testing.assert_allclose([np.linalg.norm(x, axis=1) for x in (image, text)], 1, rtol=1e-5)
    logits = image @ text.T / 0.07
    concepts = rows.fields["concept"]
    total = 0.0
    for table in (logits, logits.T):
        for i, row in enumerate(table):
            positives = [j for j in range(len(row)) if concepts[j] == concepts[i]]
            total += math.log(sum(math.exp(x) for x in row)) - np.mean(row[positives])
    expected = total / (2 * len(logits))
    assert losses(lines, "image_text")[0] == pytest.approx(expected, rel=1e-4)


def test_chance_is_what_a_draw_would_give(
    results: list[dict[str, Any]], experiment: Experiment
) -> None:
    task = experiment.tasks["image_text"]
    source = configs.component("sources", task.config.evaluators["drawings"]["source"], "source")
    examples = list(source.open())
    count = len(examples)
    concepts = Counter(int(x["concept"]) for x in examples)
    found = {r["name"]: r for r in results if r["task"] == "image_text"}
    for k in (1, 5, 10):
        # k draws without replacement from all, of which as many are right as share the concept.
        missed = [math.comb(count - n, k) / math.comb(count, k) for n in concepts.values()]
        weight = [n / count for n in concepts.values()]
        chance = 1 - float(np.dot(missed, weight))
        for direction in ("image to text", "text to image"):
            record = found[f"{direction} R@{k}"]
            assert record["chance"] == pytest.approx(chance, rel=1e-6), record
            assert record["count"] == count and 0 <= record["value"] <= 1
    assert len(results) == 8


def test_what_a_run_leaves(tiny_run: epath.Path) -> None:
    names = {p.name for p in tiny_run.iterdir()}
    assert names >= {"checkpoints", "metrics.jsonl", "tensorboard", "config.json", "results.json"}
    assert json.loads((tiny_run / "config.json").read_text()) == configs.read_file(str(CONFIG))
    clock = Clock.from_json(checkpoint.read_meta(tiny_run, 14)["clock"])
    assert clock.step == 14 and clock.positions == {
        task: visits * {"image_text": 16, "masked_image": 8}[task]
        for task, visits in clock.schedule.visits(14).items()
    }
    assert not any(clock.skipped.values()) and not any(clock.invalid.values())


# --- resume ------------------------------------------------------------------------------------


def bits(workdir: Path) -> str:
    folder = epath.Path(workdir)
    shapes = checkpoint.read_shapes(folder, 14)
    return digest(show.read_arrays(folder, 14, shapes["parameters"]))


def test_a_run_that_is_killed_ends_in_the_same_bits(
    tiny_run: epath.Path, tiny_command: Callable[..., Harness], tmp_path: Path
) -> None:
    run: Harness = tiny_command(tmp_path / "run")
    # The fourth stretch of steps begins when the first checkpoint is whole.
    kill = run.kill(Aim("step", 4), random.Random(0))
    assert kill.activity == "step" and kill.newest >= 4
    assert f"Resuming from step {kill.newest} in" in run.finish()
    assert {line["attempt"] for line in log(run.workdir)} == {0, 1}
    assert bits(run.workdir) == bits(Path(tiny_run))
    assert deterministic(run.workdir) == deterministic(Path(tiny_run))
    assert (run.workdir / "results.json").read_bytes() == (tiny_run / "results.json").read_bytes()
