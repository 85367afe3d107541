"""Evaluation of a run: its files of results, and fields of several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorstore
from etils import epath

from mmjax.core.errors import UserError
from mmjax.engine.lease_store import ObjectStore
from mmjax.monitor import metrics, summary
from mmjax.report import data
from mmjax.training import evaluation


def results(workdir: Any) -> list[dict[str, Any]]:
    return json.loads((Path(workdir) / "results.json").read_text())


def appended(workdir: Any) -> list[dict[str, Any]]:
    path = Path(workdir) / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_results_are_whole_or_not_at_all(tmp_path, monkeypatch):
    evaluation.write_results(epath.Path(tmp_path), [{"value": 1.0}])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space.*results.json"):
        evaluation.write_results(epath.Path(tmp_path), [{"value": 2.0}])
    assert results(tmp_path) == [{"value": 1.0}]


def test_what_is_not_finite_is_written_as_metrics_have_it(tmp_path):
    """JSON has no NaN: another program reads the file, and the report reads floats."""
    records = [{"name": "a", "value": float("nan"), "chance": float("inf")}]
    evaluation.write_results(epath.Path(tmp_path), records)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "results.json").read_text()
    held = json.loads(text, parse_constant=refuse)
    assert held == [{"name": "a", "value": "nan", "chance": "inf"}]
    read = data._json(epath.Path(tmp_path) / "results.json")
    assert np.isnan(read[0]["value"]) and read[0]["chance"] == np.inf and read[0]["name"] == "a"
    summary.write(epath.Path(tmp_path), {"tasks": [{"task": "nan", "loss": float("nan")}]})
    held = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert held == {"tasks": [{"task": "nan", "loss": "nan"}]}
    assert metrics.revived(held)["tasks"][0]["task"] == "nan"
    assert np.isnan(metrics.revived(held)["tasks"][0]["loss"])


def test_results_are_json_whatever_they_are(tmp_path):
    folder, records = epath.Path(tmp_path), [{"name": "loss", "value": math.inf, "step": 3}]
    evaluation.write_results(folder, records)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert evaluation.read_results(folder) == records
    evaluation.append_evaluations(folder, records)
    assert appended(tmp_path) == [{"name": "loss", "value": "inf", "step": 3}]


def test_evaluations_are_appended_whoever_appends_meanwhile(tmp_path, monkeypatch):
    """In an object store, where an append replaces the object; and after a line that a kill has torn."""
    memory = tensorstore.KvStore.open({"driver": "memory"}).result()
    store = ObjectStore(memory, "evaluations.jsonl")
    monkeypatch.setattr(evaluation, "object_store", lambda workdir, key: store)
    real, calls = store.swap, [0]

    def raced(*arguments: Any) -> bool:
        calls[0] += 1
        if calls[0] == 2:
            memory.write("evaluations.jsonl", b'{"value": 1}\n{"value": 7}\n').result()
        return real(*arguments)

    monkeypatch.setattr(store, "swap", raced)
    for value in (1, 2):
        evaluation.append_evaluations(epath.Path("gs://bucket/run"), [{"value": value}])
    lines = memory.read("evaluations.jsonl").result().value.decode().splitlines()
    assert [json.loads(line)["value"] for line in lines] == [1, 7, 2]
    (tmp_path / "evaluations.jsonl").write_text('{"value": 1}\n{"val')
    evaluation.append_evaluations(epath.Path(tmp_path), [{"value": 2}])
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"value": 1} and json.loads(lines[-1]) == {"value": 2}


def test_fields_of_several_processes_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, each with its half of two batches of four rows."""
    first, second = [[0, 1], [4, 5]], [[2, 3], [6, 7]]

    def gathered(mine: Any) -> list[Any]:
        assert mine == [2, {"label": second}]
        return [[0, {"label": first}], mine]

    monkeypatch.setattr(evaluation.processes, "gather", gathered)
    kept = [{"label": np.array(part, np.int32)} for part in second]
    assert evaluation._whole(kept, 2, 4)["label"].tolist() == list(range(8))


def test_a_thread_that_is_ended_while_it_reads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a library that calls `exit`; the run would else end with status 0 and without a word."""

    def leave(*_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(evaluation, "row_spec", lambda *_: None)
    monkeypatch.setattr(evaluation, "process_rows", lambda *_: lambda size: (0, size))
    monkeypatch.setattr(evaluation, "make_batch", leave)
    loader = SimpleNamespace(threads=1)
    run: Any = SimpleNamespace(
        _mesh=None, _experiment=SimpleNamespace(run=SimpleNamespace(loader=loader))
    )
    task: Any = SimpleNamespace(name="bright")
    examples: Any = range(8)
    with pytest.raises(UserError, match="batch 0 of the evaluation of task 'bright': SystemExit"):
        list(evaluation.Evaluation._batches(run, task, task, examples, 4))
