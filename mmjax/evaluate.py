"""Evaluation: every task's evaluators on held-out data.

    python -m mmjax.evaluate --workdir=DIR [--step=N] [--config.KEY=VALUE ...]

evaluates the newest checkpoint of a run (or that of step N) with the config it was trained with, and writes
`DIR/results.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mmjax import commandline, errors, processes
from mmjax import config as configs
from mmjax.data.loader import local_rows, make_batch, place
from mmjax.errors import UserError
from mmjax.evaluator import Outputs, Pass, Record, device_spec, row_spec
from mmjax.experiment import Experiment, make_experiment, pass_key, program_key
from mmjax.loading import find_step, read_parameters
from mmjax.monitor.lines import replace_file
from mmjax.monitor.tables import program_table, results_table
from mmjax.program import Program, compile_all, ticks, use_cache
from mmjax.sharding import batch_sharding, make_mesh
from mmjax.source import Cached, Examples
from mmjax.task import Task

RESULTS = "results.json"


class Evaluation:
    """All evaluation passes of an experiment, with their data opened."""

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._experiment, self._mesh = experiment, mesh
        self._data: dict[str, Examples] = {}
        for task, each in experiment.passes():
            self._open(task, each)

    def _open(self, task: Task, each: Pass) -> None:
        where = f"tasks.{task.name}.evaluators"
        key = str(sorted(each.block.items()))
        if key not in self._data:
            opened = configs.component("sources", each.block, f"{where}.source").open()
            self._data[key] = Cached(opened, self._experiment.run.loader.cache_mib * 2**20)
        row_spec(task, each).check(self._data[key], where)

    def __call__(
        self,
        programs: Mapping[str, Program],
        parameters: Mapping[str, jax.Array],
        beat: Callable[[str], None] = lambda task: None,
    ) -> list[Record]:
        """The records of all evaluators, in the order of the config.

        Args:
          programs: those of `Experiment.eval_requests`, compiled.
          parameters: on the mesh.
          beat: called before each batch, with the name of its task.
        """
        processes.wait_for_all()  # a collective waits for half a minute only
        outputs = {
            pass_key(task, each): self._run(
                task, each, programs[program_key(task, each)], parameters, beat
            )
            for task, each in self._experiment.passes()
        }
        records = []
        for name, evaluators in self._experiment.evaluators.items():
            task = self._experiment.tasks[name]
            for evaluator in evaluators.values():
                passes = evaluator.passes(task)
                records += evaluator.score(
                    task, {n: outputs[pass_key(task, p)] for n, p in passes.items()}
                )
        return records

    def _run(
        self,
        task: Task,
        each: Pass,
        program: Program,
        parameters: Mapping[str, jax.Array],
        beat: Callable[[str], None],
    ) -> Outputs:
        beat(task.name)
        size = self._experiment.run.evaluation.batch
        examples = self._data[str(sorted(each.block.items()))]
        found: list[Outputs] = []
        kept: list[Outputs] = []
        first, unread = 0, list[str]()
        wanted = device_spec(task, each.what).fields
        for index, (rows, first, failed) in enumerate(self._batches(task, each, examples, size)):
            beat(task.name)
            unread += [error for _, error in failed]
            kept.append({name: rows["fields"][name] for name in each.fields})
            rows = {**rows, "fields": {name: rows["fields"][name] for name in wanted}}
            batch = place(rows, first, size, batch_sharding(self._mesh, size, "evaluation.batch"))
            found.append(
                jax.device_get(program.call(parameters, batch, ticks(self._mesh, batch=index)))
            )
        for error in dict.fromkeys(sum(processes.gather(unread), [])):
            print(f"evaluation of {task.name}: left out an example that cannot be read: {error}")
        valid = np.concatenate([f["valid"] for f in found])
        if not valid.any():
            raise UserError(
                f"tasks.{task.name}.evaluators: no example of {examples.description} could be read."
            )
        outputs = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
        outputs |= _whole(kept, first, size)
        return {name: value[valid] for name, value in outputs.items()}

    def _batches(
        self, task: Task, each: Pass, examples: Examples, size: int
    ) -> Iterable[tuple[Any, int, Any]]:
        """This process's rows of each batch, read ahead in threads; the last one padded with invalid rows."""
        spec = row_spec(task, each)
        first, last = local_rows(batch_sharding(self._mesh, size, "evaluation.batch"), size)

        def make(index: int) -> tuple[Any, int, Any]:
            begin = int(index) * size
            ids = range(min(begin + first, len(examples)), min(begin + last, len(examples)))
            rows, failed = make_batch(spec, examples, ids, lambda _: None, last - first)
            return rows, first, failed

        count = math.ceil(len(examples) / size)
        options = grain.ReadOptions(
            num_threads=self._experiment.run.loader.threads, prefetch_buffer_size=2
        )
        return grain.MapDataset.range(count).map(make).to_iter_dataset(options)


def _whole(kept: Sequence[Outputs], first: int, size: int) -> Outputs:
    """Fields of all batches of `size` rows, of which this process read those from `first` on: each `[N]`."""
    mine = {name: np.stack([batch[name] for batch in kept]).tolist() for name in kept[0]}
    whole = {name: np.zeros((len(kept), size), np.int32) for name in mine}
    for begin, part in processes.gather([first, mine]):
        for name, values in part.items():
            whole[name][:, begin : begin + len(values[0])] = values
    return {name: values.reshape(-1) for name, values in whole.items()}


def write_results(workdir: epath.Path, records: Sequence[Record]) -> None:
    """`results.json`, whole or not at all."""
    replace_file(workdir / RESULTS, json.dumps(list(records), indent=1))


def read_results(workdir: epath.Path) -> list[Record] | None:
    """Return the records of `results.json`; None where there are none, or the file is damaged."""
    try:
        records = json.loads((workdir / RESULTS).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    return records if whole else None


def evaluate(workdir: epath.Path, step: int | None, overrides: Sequence[str]) -> list[Record]:
    """Evaluate a checkpoint of `workdir`; overrides may change keys that leave the model alone."""
    step, meta = find_step(workdir, step)
    print(f"The checkpoint of step {step} in {workdir}.\n")
    block = configs.override(meta["config"], overrides)
    configs.check_compatible(meta["config"], block, allow_change=True)
    experiment = make_experiment(block, str(workdir / "assets"))
    mesh = make_mesh(experiment.run.mesh)
    evaluation = Evaluation(experiment, mesh)
    programs = compile_all(experiment.eval_requests(mesh), mesh, experiment.run.limits)
    program_table([p.report for p in programs.values()])
    return evaluation(programs, read_parameters(workdir, step, experiment, mesh))


def main(argv: Sequence[str] | None = None) -> int:
    made = commandline.parser("Evaluate a run on its held-out data.")
    made.add_argument("--workdir", required=True, help="the run's folder")
    made.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    processes.add_arguments(made)
    arguments, overrides = commandline.parse(made, argv)
    processes.join(arguments)
    use_cache()
    workdir = commandline.folder(arguments.workdir)
    records = evaluate(workdir, arguments.step, overrides)
    if processes.is_first():
        write_results(workdir, records)
    results_table(records)
    print(f"Written to {workdir / RESULTS}.")
    return 0


if __name__ == "__main__":
    errors.run(main)
