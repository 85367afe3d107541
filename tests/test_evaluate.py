"""`mmjax evaluate`: the numbers of training's end, other steps, and what may be overridden."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from mains import refused, run

from mmjax import evaluate
from mmjax.engine.loader import make_batch
from mmjax.sources.tfds import Tfds
from mmjax.training import evaluation

NAMES = [f"{pair} R@{k}" for pair in ("image to text", "text to image") for k in (1, 5, 10)]
NAMES += ["zero-shot group", "held-out loss"]
DRAWINGS = 242  # held-out drawings


@pytest.fixture(scope="module")
def copy(tiny_run: epath.Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the run, whose results may change."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    shutil.copytree(tiny_run, folder)
    return folder


def results(workdir: Any) -> list[dict[str, Any]]:
    return json.loads((Path(workdir) / "results.json").read_text())


def appended(workdir: Any) -> list[dict[str, Any]]:
    path = Path(workdir) / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluated(workdir: Path, *words: str) -> list[dict[str, Any]]:
    """Return the records that an evaluation appends; the run's own results stay."""
    before, own = appended(workdir), (workdir / "results.json").read_bytes()
    ended = run(evaluate.main, f"--workdir={workdir}", *words)
    assert (ended.status, ended.err) == (0, ""), ended.err
    assert f"{workdir}/evaluations.jsonl" in ended.out
    after = appended(workdir)
    assert after[: len(before)] == before and (workdir / "results.json").read_bytes() == own
    return after[len(before) :]


def values(records: list[dict[str, Any]]) -> dict[str, float]:
    return {r["name"]: r["value"] for r in records}


def test_the_same_numbers_as_at_the_end_of_training(tiny_run, copy, command):
    done = command("evaluate", f"--workdir={copy}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 14" in done.stdout
    records = appended(copy)
    for record in records:
        assert record.pop("command") == f"mmjax evaluate --workdir={copy}"
        moment = datetime.fromisoformat(record.pop("time"))
        assert moment.utcoffset() == timedelta(0) and moment.year >= 2025
    assert records == results(tiny_run), "the same programs on the same device"


def test_records_say_what_they_are(tiny_run, emoji_dir):
    records = results(tiny_run)
    assert [r["name"] for r in records] == NAMES
    assert len(Tfds("emoji", "test_drawing").open()) == DRAWINGS
    for record in records:
        assert {"name", "task", "split", "value", "chance", "count"} <= set(record)
        assert (record["split"], record["count"]) == ("test_drawing", DRAWINGS)
        loss = record.get("unit") == "loss"
        assert record["task"] == ("masked_image" if loss else "image_text")
        assert record["step"] == 14
        assert loss or 0 <= record["value"] <= 1 and 0 < record["chance"] < 1
    assert {r["evaluator"] for r in records} == {"drawings", "groups"}
    zero_shot = records[NAMES.index("zero-shot group")]
    groups = [int(e["group"]) for e in Tfds("emoji", "test_drawing").open()]
    _, counts = np.unique(groups, return_counts=True)
    assert zero_shot["majority"] == pytest.approx(counts.max() / DRAWINGS)
    assert zero_shot["chance"] == pytest.approx(1 / len(counts))


def test_the_table_shows_every_record(copy):
    ended = run(evaluate.main, f"--workdir={copy}")
    for name in NAMES:
        assert name in ended.out
    assert "chance" in ended.out and "majority" in ended.out


def test_another_step_gives_other_numbers(tiny_run, copy):
    records = evaluated(copy, "--step=12")
    assert {r["step"] for r in records} == {12}
    older = values(records)
    assert abs(older["held-out loss"] - values(results(tiny_run))["held-out loss"]) > 1e-3


@pytest.mark.parametrize("words", [[], ["evaluation.batch=32", "mesh.data=4", "mesh.fsdp=2"]])
def test_other_devices_and_batches_give_the_same_numbers(tiny_run, copy, words):
    """Eight devices here, one there; each example draws its own mask whatever the batch that it comes in."""
    expected = values(results(tiny_run))
    found = values(evaluated(copy, *(f"--config.{word}" for word in words)))
    for name in NAMES[:-1]:
        assert found[name] == pytest.approx(expected[name], abs=1.5 / DRAWINGS), name
    assert found["held-out loss"] == pytest.approx(expected["held-out loss"], rel=1e-4)


def test_evaluators_are_free(copy):
    source = {"name": "tfds", "dataset": "emoji", "split": "test_concept[:64]"}
    block = {"k": {"name": "retrieval", "at": [2], "source": source}}
    none = "--config.tasks.masked_image.evaluators={}"
    records = evaluated(copy, none, f"--config.tasks.image_text.evaluators={block}")
    assert [r["name"] for r in records] == ["image to text R@2", "text to image R@2"]
    assert {r["split"] for r in records} == {"test_concept[:64]"} and records[0]["count"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step=3"], "No checkpoint of step 3 in '{run}'. There are: 14, 12."),
        (["--config.model.width=64"], "model.width (structural): saved 32, now 64"),
        (["--config.model.widht=64"], "model.widht"),
        (["--config.tasks.image_text.source.split=test_concept"], "source.split (structural)"),
        (["--config.evaluation.batch=12"], "batch 12 does not divide over the 8 parts"),
        (["--config.mesh.data=3"], "does not make up the 8 devices here"),
        (["--config.tasks.image_text.evaluators.groups.label=gruop"], "'gruop'"),
        (["--config.tasks.image_text.evaluators.groups.label=caption"], "(str); expected an integer"),
        (["--config.tasks.masked_image.evaluators.drawings.name=retrieval"], "embeds two modalities"),
        (["--stpe=3"], "Unknown argument --stpe=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(tiny_run, words, message):
    found = refused(evaluate.main, f"--workdir={tiny_run}", *words)
    assert message.format(run=tiny_run) in found


def test_a_workdir_without_a_run(tmp_path):
    assert "Train first" in refused(evaluate.main, f"--workdir={tmp_path}/nothing")
    assert not (tmp_path / "nothing").exists()


def test_missing_data_says_what_to_run(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("MMJAX_DATA_DIR", str(tmp_path))
    message = refused(evaluate.main, f"--workdir={copy}")
    assert f"mmjax build emoji --data_dir={tmp_path}" in message


def test_examples_that_cannot_be_read_are_told_and_left_out(copy, monkeypatch):
    def failing(spec: Any, examples: Any, ids: Any, *rest: Any) -> Any:
        rows, failed = make_batch(spec, examples, ids, *rest)
        if 0 in ids:
            rows.valid[0] = False
            failed = ((0, "emoji[0]: garbage"),)
        return rows, failed

    monkeypatch.setattr(evaluation, "make_batch", failing)
    count = len(appended(copy))
    ended = run(evaluate.main, f"--workdir={copy}")
    assert ended.status == 0 and "emoji[0]: garbage" in ended.out
    assert {r["count"] for r in appended(copy)[count:]} == {DRAWINGS - 1}


def test_no_example_at_all_is_an_error(copy, monkeypatch):
    def failing(*arguments: Any) -> Any:
        rows, _ = make_batch(*arguments)
        rows.valid[:] = False
        return rows, ()

    monkeypatch.setattr(evaluation, "make_batch", failing)
    before = (copy / "results.json").read_text(), appended(copy)
    message = refused(evaluate.main, f"--workdir={copy}")
    assert "no example of emoji/1.0.0:test_drawing could be read" in message
    assert ((copy / "results.json").read_text(), appended(copy)) == before
