"""Replay one visit of one task of a run, and compare its loss with the run's metrics.

    mmjax replay --workdir=DIR --task=NAME --visit=N [--extra=DIR]

It trains from the newest checkpoint before that visit (or from the initial state) up to the visit, and
prints its loss and gradient norm beside those in `metrics.jsonl`. The workdir is not changed. Exit status:
0 the same bits, 1 others, 2 an error that its one line explains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax.core import errors, flags
from mmjax.core.errors import UserError, nearest
from mmjax.core.sharding import make_mesh
from mmjax.core.workdir import METRICS
from mmjax.engine import checkpoint, processes
from mmjax.engine.compile import compile_all, use_cache
from mmjax.engine.loader import Loader, process_rows
from mmjax.engine.requests import train_requests
from mmjax.engine.state import Clock
from mmjax.experiment import make_experiment
from mmjax.loading import find_step
from mmjax.monitor import metrics
from mmjax.monitor.tables import table
from mmjax.schedule.schedule import Schedule
from mmjax.training.flight import dispatch
from mmjax.training.initial_state import initial_state
from mmjax.training.session import Session, reopen

_COMPARED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Replayed:
    """A visit, twice.

    Attributes:
      step: its step.
      start: the step of the checkpoint that it was replayed from.
      then, now: loss and gradient norm as logged, and as replayed.
    """

    step: int
    start: int
    then: Mapping[str, float]
    now: Mapping[str, float]

    @property
    def is_same(self) -> bool:
        """Bit for bit; a number that is not finite is the same as its like."""
        return all(np.array_equal(self.then[n], self.now[n], equal_nan=True) for n in _COMPARED)


def replay(
    workdir: epath.Path, task: str, visit: int, devices: Sequence[jax.Device] | None = None
) -> Replayed:
    """Replay one visit, counted from 0 as in `metrics.jsonl`, on `devices` (all, if None).

    Raises:
      UserError: no such task; a visit that the newest checkpoint does not know of.
    """
    newest, meta = find_step(workdir, None)
    step = find_visit(Clock.from_json(meta["clock"]).schedule, task, visit, newest)
    saved = checkpoint.steps(workdir)
    # The next checkpoint holds what was in force at the step: a change takes effect after one.
    meta = checkpoint.read_meta(workdir, min(s for s in saved if s > step))
    experiment = make_experiment(meta["config"], str(workdir / "assets"))
    mesh = make_mesh(experiment.run.mesh, devices)
    start = max((s for s in saved if s <= step), default=None)
    session = reopen(experiment, workdir, mesh, start, Clock.from_json(meta["clock"]).schedule)
    return Replayed(step, start or 0, _logged(workdir, step), _run(session, step))


def find_visit(schedule: Schedule, task: str, visit: int, steps: int) -> int:
    """Return the step below `steps` that is the task's visit number `visit`."""
    if task not in schedule.tasks:
        raise UserError(f"--task={task}: the run has no such task.{nearest(task, schedule.tasks)}")
    count = schedule.visits(steps)[task]
    if not 0 <= visit < count:
        raise UserError(
            f"--visit={visit}: in the {steps} steps of the newest checkpoint, task '{task}' has {count} "
            "visits, from 0."
        )
    low, high = 0, steps - 1
    while low < high:
        middle = (low + high) // 2
        if schedule.visits(middle + 1)[task] > visit:
            high = middle
        else:
            low = middle + 1
    return low


def _run(session: Session, last: int) -> dict[str, float]:
    """Return the steps up to `last`; its metrics."""
    experiment, mesh, clock = session.experiment, session.mesh, session.clock
    schedule, run = clock.schedule, experiment.run
    requests = train_requests(experiment, mesh)
    needed = experiment.phases.visits(schedule, clock.step, last + 1)
    chosen = {n: requests[n] for n in requests if n in needed}
    with processes.compiling(chosen) as watch:
        programs = compile_all(chosen, mesh, run.limits, watch)
    state = initial_state(experiment, mesh, session.start)
    values: Mapping[str, jax.Array] = {}

    rows = process_rows(mesh)
    loader = Loader(run.loader, experiment.phases, session.data, clock, last + 1, run.seed, rows)
    positions = Counter(clock.positions)
    for host in loader:
        name, visit = schedule.task(host.step), schedule.visit(host.step)
        variant = experiment.phases.variant(name, host.step, visit)
        task, program = variant.task, programs[variant.program]
        now = {
            "visit": visit,
            **experiment.optimizers.progress(name, host.step, positions, schedule),
        }
        state, values = dispatch(program, task, mesh, state, host, now)
        positions[task.name] += task.batch
        jax.block_until_ready(values)
    loader.close()
    return {name: float(values[name]) for name in _COMPARED}


def _logged(workdir: epath.Path, step: int) -> dict[str, float]:
    for line in metrics.read(workdir):
        if (line["kind"], line["step"]) == ("train", step):
            return {name: float(line[name]) for name in _COMPARED}
    raise UserError(f"{workdir / METRICS} has no line of step {step}.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("replay", __doc__)
    flags.add_workdir(parser)
    parser.add_argument("--task", required=True, metavar="NAME", help="name of the task")
    parser.add_argument(
        "--visit", required=True, type=int, metavar="N", help="which of its visits, from 0"
    )
    arguments, overrides = flags.parse(parser, argv)
    if overrides:
        raise UserError(f"--config.{overrides[0]}: a replay takes the config of the run.")
    use_cache()
    workdir = flags.folder(arguments.workdir)
    outcome = replay(workdir, arguments.task, arguments.visit)
    print(
        f"Visit {arguments.visit} of task '{arguments.task}' is step {outcome.step}; "
        f"replayed from step {outcome.start}.\n"
    )
    rows: list[Any] = [(n, repr(outcome.then[n]), repr(outcome.now[n])) for n in _COMPARED]
    table("", ["measure", "metrics.jsonl", "replayed"], rows)
    print("Identical: the same bits." if outcome.is_same else "DIFFERENT.")
    return 0 if outcome.is_same else 1


if __name__ == "__main__":
    errors.run(main)
