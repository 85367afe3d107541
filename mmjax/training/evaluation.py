"""Evaluation of a run: its passes over held-out examples, and the files of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.errors import UserError
from mmjax.core.files import is_local, replace_file
from mmjax.core.sharding import batch_sharding
from mmjax.core.workdir import EVALUATIONS, RESULTS
from mmjax.data.identity import is_same
from mmjax.engine import processes
from mmjax.engine.compile import Program
from mmjax.engine.lease_store import object_store
from mmjax.engine.loader import make_batch, no_silent_end, place, process_rows
from mmjax.engine.requests import pass_key, program_key
from mmjax.engine.steps import ticks
from mmjax.evaluators.base import Outputs, Pass, Record, device_spec, records_of, row_spec
from mmjax.experiment import Experiment
from mmjax.monitor import metrics
from mmjax.monitor.line_file import LineFile
from mmjax.sources.base import Cached, Examples
from mmjax.task import Task

_HELD_OUT = "held-out "  # begins the keys of identities of evaluators' data


class Evaluation:
    """All evaluation passes of an experiment, with their data opened.

    Attributes:
      identities: digests of the held-out data, by their blocks; a checkpoint holds them beside those of a run's data.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._experiment, self._mesh = experiment, mesh
        self._data = open_held_out(experiment)
        self.identities = {_HELD_OUT + key: data.identity for key, data in self._data.items()}

    def __call__(
        self,
        programs: Mapping[str, Program],
        parameters: Mapping[str, jax.Array],
        beat: Callable[[str], None] = lambda task: None,
    ) -> list[Record]:
        """Return the records of all evaluators, in the order of the config.

        Args:
          programs: those of `mmjax.engine.requests.eval_requests`, compiled.
          parameters: on the mesh.
          beat: called before each batch, with the name of its task.
        """
        processes.wait_for_all()  # a collective waits for half a minute only
        outputs = {
            pass_key(task, pass_): self._run(
                task, pass_, programs[program_key(task, pass_)], parameters, beat
            )
            for task, pass_ in self._experiment.passes()
        }
        records = []
        for name, evaluators in self._experiment.evaluators.items():
            task = self._experiment.tasks[name]
            for key, evaluator in evaluators.items():
                passes = evaluator.passes(task)
                by_pass = {n: outputs[pass_key(task, p)] for n, p in passes.items()}
                scores = records_of(evaluator, task, by_pass)
                records += [{"evaluator": key, **record} for record in scores]
        return records

    def _run(
        self,
        task: Task,
        pass_: Pass,
        program: Program,
        parameters: Mapping[str, jax.Array],
        beat: Callable[[str], None],
    ) -> Outputs:
        beat(task.name)
        size = self._experiment.run.evaluation.batch
        examples = self._data[_key(pass_)]
        collected: list[Outputs] = []
        field_values: list[Outputs] = []
        first, unread = 0, list[str]()
        fields = device_spec(task, pass_.computation).fields
        for index, (rows, first, failed) in enumerate(self._batches(task, pass_, examples, size)):
            beat(task.name)
            unread += [error for _, error in failed]
            field_values.append({name: rows.fields[name] for name in pass_.fields})
            rows = replace(rows, fields={name: rows.fields[name] for name in fields})
            batch = place(rows, first, size, batch_sharding(self._mesh, size, "evaluation.batch"))
            collected.append(
                jax.device_get(program.call(parameters, batch, ticks(self._mesh, batch=index)))
            )
        for error in dict.fromkeys(sum(processes.gather(unread), [])):
            print(f"evaluation of {task.name}: skipped an example that cannot be read: {error}")
        valid = np.concatenate([f["valid"] for f in collected])
        if not valid.any():
            raise UserError(
                f"tasks.{task.name}.evaluators: no example of {examples.description} could be read."
            )
        outputs = {name: np.concatenate([f[name] for f in collected]) for name in collected[0]}
        outputs |= _whole(field_values, first, size)
        return {name: value[valid] for name, value in outputs.items()}

    def _batches(
        self, task: Task, pass_: Pass, examples: Examples, size: int
    ) -> Iterable[tuple[Batch, int, Any]]:
        """Yield this process's rows of each batch, read ahead in threads; the last one padded with invalid rows."""
        spec = row_spec(task, pass_)
        first, last = process_rows(self._mesh, "evaluation.batch")(size)

        def make(index: int) -> tuple[Batch, int, Any]:
            begin = int(index) * size
            ids = range(min(begin + first, len(examples)), min(begin + last, len(examples)))
            with no_silent_end(f"batch {index} of the evaluation", task.name):
                rows, failed = make_batch(spec, examples, ids, lambda _: None, last - first)
            return rows, first, failed

        count = math.ceil(len(examples) / size)
        options = grain.ReadOptions(
            num_threads=self._experiment.run.loader.threads, prefetch_buffer_size=2
        )
        return grain.MapDataset.range(count).map(make).to_iter_dataset(options)


def open_held_out(experiment: Experiment) -> dict[str, Examples]:
    """Return the data of all passes, opened and checked, by their blocks."""
    data: dict[str, Examples] = {}
    for task, pass_ in experiment.passes():
        where = f"tasks.{task.name}.evaluators"
        if _key(pass_) not in data:
            opened = configs.component("sources", pass_.block, f"{where}.source").open()
            data[_key(pass_)] = Cached(opened, experiment.run.loader.cache_mib * 2**20)
        row_spec(task, pass_).check(data[_key(pass_)], where)
    return data


def _key(pass_: Pass) -> str:
    return json.dumps(pass_.block, sort_keys=True)


def _whole(batches: Sequence[Outputs], first: int, size: int) -> Outputs:
    """Return the fields of all batches of `size` rows, of which this process read those from `first` on: each `[N]`."""
    mine = {name: np.stack([batch[name] for batch in batches]).tolist() for name in batches[0]}
    whole = {name: np.zeros((len(batches), size), np.int32) for name in mine}
    for begin, part in processes.gather([first, mine]):
        for name, values in part.items():
            whole[name][:, begin : begin + len(values[0])] = values
    return {name: values.reshape(-1) for name, values in whole.items()}


def announce_changed(
    saved: Mapping[str, str], evaluation: Evaluation, log: Callable[[str], None]
) -> None:
    """Log which held-out data differ from those of a checkpoint.

    They are not refused, as a run's own data are: evaluation only reads, and no step depends on it. Results from here
    on are of the other data.
    """
    for key, now in evaluation.identities.items():
        if not is_same(saved.get(key, now), now):
            log(
                f"The {key} has changed since the run's checkpoint was written: results are not comparable with "
                "earlier ones."
            )


def after(step: int, records: Iterable[Record]) -> list[Record]:
    """Return the records with the number of complete steps after which they were taken."""
    return [{**record, "step": step} for record in records]


def write_results(workdir: epath.Path, records: Sequence[Record]) -> None:
    """Write `results.json`, whole or not at all; what is not finite as `metrics.jsonl` has it."""
    text = json.dumps(metrics.strict(list(records)), indent=1, allow_nan=False)
    replace_file(workdir / RESULTS, text)


def read_results(workdir: epath.Path) -> list[Record] | None:
    """Return the records of `results.json`; None where there are none, or the file is damaged."""
    try:
        records = json.loads((workdir / RESULTS).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    return [metrics.revived(record) for record in records] if whole else None


def append_evaluations(workdir: epath.Path, records: Iterable[Record]) -> None:
    """Append a line for each record to `evaluations.jsonl`; two processes may do so at once."""
    text = "".join(json.dumps(metrics.strict(record), allow_nan=False) + "\n" for record in records)
    if is_local(workdir):
        lines = LineFile(workdir / EVALUATIONS)
        lines.append(text)
        lines.close()
        return
    store = object_store(workdir, EVALUATIONS)
    while not store.swap(entry := store.read(), (entry.text or b"") + text.encode()):
        pass  # another process has appended; read again
