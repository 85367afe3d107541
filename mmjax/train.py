"""Training: alternating gradient descent over the tasks of a config.

    python -m mmjax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

Run again, it goes on from the newest checkpoint in DIR, or says that it is done. Exit status: 0 done, 2 an
error that its one line explains, 3 stopped by SIGTERM or SIGINT after saving.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax import commandline, errors
from mmjax.checkpoint import Checkpoints
from mmjax.config import Block
from mmjax.data.loader import HostBatch, Loader, local_rows, place
from mmjax.errors import UserError
from mmjax.evaluate import RESULTS, Evaluation, write_results
from mmjax.evaluator import Record
from mmjax.experiment import make_experiment
from mmjax.monitor.display import Progress
from mmjax.monitor.metrics import MetricWriter
from mmjax.monitor.phases import PhaseLog
from mmjax.monitor.report import write_report
from mmjax.monitor.tables import program_table, results_table
from mmjax.program import Program, compile_all, ticks, use_cache
from mmjax.resume import Session, begin
from mmjax.sharding import batch_sharding, make_mesh
from mmjax.state import State

STOPPED = 3
_IN_FLIGHT = 2  # hundreds of steps in flight abort a run on many CPU devices


def train(block: Block, workdir: epath.Path, allow_change: bool = False,
          devices: Sequence[jax.Device] | None = None) -> list[Record] | None:  # fmt: skip
    """Run the config in `workdir` to its last step.

    Args:
      block: the config as plain data.
      workdir: made if it is not there; gone on with if it holds a run.
      allow_change: whether keys of class `schedule` may differ from the saved run's.
      devices: what to run on; all of JAX's if None.

    Returns:
      The records of the last evaluation, or None if a signal stopped the run early.
    """
    experiment = make_experiment(block)
    with PhaseLog(workdir) as phases:
        mesh = make_mesh(experiment.run.mesh, devices)
        with phases.phase("init"):
            session = begin(experiment, workdir, mesh, allow_change, print, phases.phase)
        if session.is_done:
            records = json.loads((workdir / RESULTS).read_text())
            print(f"Done: {workdir} holds all {experiment.run.steps} steps and their results.")
            results_table(records)
            return list(records)
        evaluation = Evaluation(experiment, mesh)
        with phases.phase("compile"):
            requests = experiment.train_requests(mesh) | experiment.eval_requests(mesh)
            programs = compile_all(requests, mesh, experiment.run.limits)
            session.prepare()
            program_table([p.report for p in programs.values()])
        with phases.phase("restore"):
            state = session.state()
        return _Loop(session, programs, evaluation, phases).run(state)


class _Signals:
    """Notes SIGTERM and SIGINT, so that the loop can save before it ends; before it they just end it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError):  # not the main thread: a notebook or a test's worker
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt  # asked twice: at once
        self.received = signal.Signals(number).name


@dataclass
class _Dispatched:
    """A step under way: its metrics are still on the devices."""

    step: int
    task: str
    metrics: Mapping[str, jax.Array]
    examples: int
    waited: float


class _Loop:
    """The loop, with one place for each side effect."""

    def __init__(
        self,
        session: Session,
        programs: Mapping[str, Program],
        evaluation: Evaluation,
        phases: PhaseLog,
    ):
        self._session, self._programs, self._evaluation = session, programs, evaluation
        self._experiment, self._run = session.experiment, session.experiment.run
        self._mesh, self._clock, self._phases = session.mesh, session.clock, phases
        self._bad_in_a_row: Counter[str] = Counter()
        self._completed = time.monotonic()

    def run(self, state: State) -> list[Record] | None:
        """From the session's clock to the last step."""
        schedule, step = self._clock.schedule, self._clock.step
        visits, end = schedule.visits(step), schedule.visits(self._run.steps)
        left = {name: end.get(name, 0) - visits.get(name, 0) for name in self._experiment.tasks}
        tasks = list(self._experiment.tasks)
        progress = Progress(self._run.steps, step, tasks, visits=visits, visits_left=left)
        with (
            _Signals() as self._signals,
            MetricWriter(self._session.workdir, step) as self._writer,
            Checkpoints(self._session.workdir, self._run.checkpoint) as self._checkpoints,
            progress as self._progress,
            self._open_loader() as loader,
        ):
            return self._stretches(state, loader)

    @contextmanager
    def _open_loader(self) -> Iterator[Loader]:
        def share(size: int) -> tuple[int, int]:
            return local_rows(batch_sharding(self._mesh, size, "batch"), size)

        tasks, data, seed = self._experiment.tasks, self._session.data, self._run.seed
        loader = Loader(self._run.loader, tasks, data, self._clock, self._run.steps, seed, share)
        try:
            yield loader
        finally:
            loader.close()

    def _stretches(self, state: State, loader: Loader) -> list[Record] | None:
        """Steps without a pause, then what is due: a checkpoint, an evaluation.

        A checkpoint of step S comes before the evaluation at S, which a restart from S does again.
        """
        if self._session.was_evaluated and self._clock.step < self._run.steps:
            self._evaluate(state)
        while self._clock.step < self._run.steps and not self._signals.received:
            before = self._clock.step
            with self._phases.phase("step", step=before):
                state = self._steps(state, loader, self._next_pause())
            if self._clock.step > before:
                self._pause(state)
        if self._signals.received and self._clock.step < self._run.steps:
            self._save(state)
            self._checkpoints.wait()
            self._progress.message(
                f"Stopped by {self._signals.received}; saved step {self._clock.step}."
            )
            return None
        records = self._evaluate(state)
        self._checkpoints.wait()
        write_results(self._session.workdir, records)
        if self._run.log.report and jax.process_index() == 0:
            self._progress.status("writing report.html")
            with self._phases.phase("report"):
                write_report(self._session.workdir)
        return records

    def _pause(self, state: State) -> None:
        last = self._clock.step == self._run.steps
        if last or self._is_due(self._run.checkpoint.every):
            self._save(state)
        if not last and self._is_due(self._run.evaluation.every):
            self._evaluate(state)

    def _is_due(self, every: int) -> bool:
        return bool(every) and self._clock.step % every == 0

    def _next_pause(self) -> int:
        step = self._clock.step
        paces = (self._run.checkpoint.every, self._run.evaluation.every)
        return min([self._run.steps, *((step // every + 1) * every for every in paces if every)])

    def _steps(self, state: State, loader: Loader, stop: int) -> State:
        """Dispatch steps up to `stop`; nothing here may trace, compile or move data unasked."""
        under_way: deque[_Dispatched] = deque()
        self._completed = time.monotonic()
        with jax.no_tracing(True), jax.transfer_guard("disallow"):
            for step in range(self._clock.step, stop):
                if self._signals.received:
                    break
                started = time.monotonic()
                host = next(loader)
                waited = time.monotonic() - started
                task, visit = self._clock.schedule.task(step), self._clock.schedule.visit(step)
                size = self._experiment.tasks[task].batch
                batch = place(
                    host.rows, host.start, size, batch_sharding(self._mesh, size, f"tasks.{task}")
                )
                progress = self._experiment.progress(self._clock.positions)
                state, metrics = self._programs[task].call(
                    state, batch, ticks(self._mesh, step=step, visit=visit, **progress)
                )
                under_way.append(_Dispatched(step, task, metrics, size, waited))
                self._count(task, host)
                if len(under_way) >= _IN_FLIGHT:
                    self._complete(under_way.popleft())
            while under_way:
                self._complete(under_way.popleft())
        return state

    def _count(self, task: str, host: HostBatch) -> None:
        """Move the clock past a dispatched step; name examples that could not be read."""
        positions = Counter(self._clock.positions)
        invalid = Counter(self._clock.invalid)
        positions[task] += self._experiment.tasks[task].batch
        invalid[task] += len(host.failed)
        self._clock = replace(
            self._clock, step=host.step + 1, positions=dict(positions), invalid=dict(invalid)
        )
        for position, error in host.failed:
            self._tell("invalid example", f"task {task}, position {position}: {error}")
        if invalid[task] > self._run.limits.invalid:
            raise UserError(
                f"Task '{task}': {invalid[task]} examples could not be read, over limits.invalid = "
                f"{self._run.limits.invalid}. The last: {host.failed[-1][1] if host.failed else ''}"
            )

    def _complete(self, done: _Dispatched) -> None:
        """Fetch a step's metrics, the next one being under way, and report them."""
        values = {name: np.asarray(value) for name, value in jax.device_get(done.metrics).items()}
        now = time.monotonic()
        seconds, self._completed = now - self._completed, now
        finite = bool(values.pop("finite"))
        visit = self._clock.schedule.visit(done.step)
        timing = {"seconds": seconds, "wait": done.waited}
        self._writer.write(done.step, done.task, {"visit": visit, **values}, timing)
        self._phases.add("wait_data", done.waited)
        self._progress.update(done.step, done.task, float(values["loss"]), done.examples, seconds)
        if finite:
            self._bad_in_a_row[done.task] = 0
        else:
            self._non_finite(done)
        if (done.step + 1) % self._run.log.every == 0:
            self._writer.flush()
            self._phases.beat(step=done.step)

    def _non_finite(self, done: _Dispatched) -> None:
        skipped = Counter(self._clock.skipped)
        skipped[done.task] += 1
        self._clock = replace(self._clock, skipped=dict(skipped))
        self._bad_in_a_row[done.task] += 1
        ids = self._session.example_ids(done.task, self._clock.schedule.visit(done.step))
        words = f"{', '.join(map(str, ids[:16]))}{', ...' if len(ids) > 16 else ''}"
        self._tell("non-finite", f"step {done.step}, task {done.task}: no update; examples {words}")
        if self._bad_in_a_row[done.task] >= self._run.limits.non_finite:
            raise UserError(
                f"Task '{done.task}': {self._bad_in_a_row[done.task]} steps in a row with a non-finite loss or "
                f"gradient, up to step {done.step}. Lower optimizer.learning_rate, or look at examples {words}."
            )

    def _save(self, state: State) -> None:
        self._progress.status("saving")
        with self._phases.phase("save", step=self._clock.step):
            # A checkpoint must not know of a step whose line could still be lost.
            self._writer.flush()
            self._checkpoints.wait()
            self._checkpoints.save(
                self._clock.step, self._session.canonical(state), self._session.meta(self._clock)
            )

    def _evaluate(self, state: State) -> list[Record]:
        self._progress.status("evaluating")
        with self._phases.phase("eval", step=self._clock.step):
            records = self._evaluation(self._programs, self._session.evaluated(state))
            self._writer.write_eval(self._clock.step, records)
            self._writer.flush()
        return records

    def _tell(self, name: str, text: str) -> None:
        self._phases.event(name, text=text)
        self._progress.message(f"{name}: {text}")


def main(argv: Sequence[str] | None = None) -> int:
    made = commandline.parser("Train a config.")
    made.add_argument("--config", required=True, help="a Python file with get_config()")
    made.add_argument("--workdir", required=True, help="folder of the run; made if it is not there")
    made.add_argument(
        "--allow_change",
        action="store_true",
        help="let keys of the schedule differ from the saved run's",
    )
    arguments, overrides = commandline.parse(made, argv)
    block = commandline.read_config(arguments.config, overrides)
    use_cache()
    workdir = commandline.make_workdir(arguments.workdir)
    started = time.monotonic()
    records = train(block, workdir, arguments.allow_change)
    if records is None:
        return STOPPED
    results_table(records)
    print(f"Finished in {time.monotonic() - started:.0f} s. Everything is in {workdir}.")
    return 0


if __name__ == "__main__":
    errors.run(main)
