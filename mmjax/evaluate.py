"""Evaluate a run on the held-out data of its tasks.

    mmjax evaluate --workdir=DIR [--step=N] [--config.KEY=VALUE ...]

It evaluates the newest checkpoint of a run (or that of step N) with the config it was trained with, and appends a line
for each measure to `DIR/evaluations.jsonl`. The run's own results stay in `results.json`. A run may train in DIR
meanwhile.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from etils import epath

from mmjax.core import config as configs
from mmjax.core import errors, flags
from mmjax.core.sharding import make_mesh
from mmjax.core.workdir import EVALUATIONS
from mmjax.engine import processes
from mmjax.engine.compile import compile_all, use_cache
from mmjax.engine.requests import eval_requests
from mmjax.evaluators.base import Record
from mmjax.experiment import make_experiment
from mmjax.loading import check_files, find_step, read_parameters
from mmjax.monitor.tables import program_table, results_table
from mmjax.run_config import RunConfig
from mmjax.training.evaluation import (
    Evaluation,
    after,
    announce_changed,
    append_evaluations,
)
from mmjax.training.identity import check_code


def evaluate(workdir: epath.Path, step: int | None, overrides: Sequence[str]) -> list[Record]:
    """Evaluate a checkpoint of `workdir`; overrides may change keys that leave the model alone.

    Returns:
      The records; each also has the `evaluator`'s name in the config, and the `step`.
    """
    step, meta = find_step(workdir, step)
    print(f"Checkpoint: step {step} of {workdir}.\n")
    block = configs.override(meta["config"], overrides)
    configs.check_compatible(meta["config"], block, allow_change=True, schema=RunConfig)
    experiment = make_experiment(block, str(workdir / "assets"))
    check_code(meta["identities"], experiment, True, print)
    check_files(workdir, meta, experiment)
    mesh = make_mesh(experiment.run.mesh)
    evaluation = Evaluation(experiment, mesh)
    announce_changed(meta.get("identities", {}), evaluation, print)
    requests = eval_requests(experiment, mesh)
    with processes.compiling(requests) as watch:
        programs = compile_all(requests, mesh, experiment.run.limits, watch)
    program_table([p.report for p in programs.values()])
    return after(step, evaluation(programs, read_parameters(workdir, step, experiment, mesh)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("evaluate", __doc__)
    flags.add_workdir(parser)
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint; the newest if not given"
    )
    processes.add_arguments(parser)
    arguments, overrides = flags.parse(parser, argv)
    processes.join(arguments)
    use_cache()
    workdir = flags.run_folder(arguments.workdir)
    records = evaluate(workdir, arguments.step, overrides)
    if processes.is_first():
        words = ["mmjax", "evaluate", *(sys.argv[1:] if argv is None else argv)]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = {"time": now, "command": shlex.join(words)}
        append_evaluations(workdir, [{**record, **stamp} for record in records])
    results_table(records)
    print(f"Appended to {workdir / EVALUATIONS}.")
    return 0


if __name__ == "__main__":
    errors.run(main)
