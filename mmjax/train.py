"""Training: alternating gradient descent over the tasks of a config.

    python -m mmjax.train --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]

Run again, it goes on from the newest checkpoint in DIR, or says that it is done. Exit status: 0 done, 2 an
error that its one line explains, 3 stopped by SIGTERM or SIGINT after saving, 4 ended by its watchdog.
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
from jax.sharding import Mesh

from mmjax import commandline, errors, processes
from mmjax.checkpoint import Checkpoints
from mmjax.config import Block
from mmjax.data.loader import HostBatch, Loader, local_rows, place
from mmjax.errors import UserError
from mmjax.evaluate import RESULTS, Evaluation, write_results
from mmjax.evaluator import Record
from mmjax.experiment import make_experiment
from mmjax.health import Diverged, Health, quarantine
from mmjax.monitor.display import Progress
from mmjax.monitor.metrics import MetricWriter
from mmjax.monitor.muted import MutedMetrics, MutedPhases
from mmjax.monitor.phases import PhaseLog
from mmjax.monitor.report import write_report
from mmjax.monitor.tables import program_table, results_table
from mmjax.program import Program, compile_all, ticks, use_cache
from mmjax.resume import Session, begin, roll_back
from mmjax.sharding import batch_sharding, make_mesh
from mmjax.state import Clock, State
from mmjax.task import Task
from mmjax.watchdog import Watchdog

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
    with PhaseLog(workdir) if processes.is_first() else MutedPhases() as phases:
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
        processes.wait_for_all()  # the first collective waits for half a minute only
        with _Signals() as signals:
            while True:
                try:
                    with phases.phase("restore"):
                        state = session.state()
                    return _Loop(session, programs, evaluation, phases, signals).run(state)
                except Diverged as diverged:
                    phases.event("diverged", text=str(diverged))
                    session = roll_back(session, diverged, allow_change, print, phases.phase)


def dispatch(
    program: Program, task: Task, mesh: Mesh, state: State, host: HostBatch, visit: int
) -> tuple[State, Mapping[str, jax.Array]]:
    """Begin one step of a task: its batch to the mesh, then its program. `state` is consumed."""
    sharding = batch_sharding(mesh, task.batch, f"tasks.{task.name}")
    batch = place(host.rows, host.start, task.batch, sharding)
    after, metrics = program.call(state, batch, ticks(mesh, step=host.step, visit=visit))
    return after, metrics


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
        signals: _Signals,
    ):
        self._signals = signals
        self._session, self._programs, self._evaluation = session, programs, evaluation
        self._experiment, self._run = session.experiment, session.experiment.run
        self._mesh, self._clock, self._phases = session.mesh, session.clock, phases
        self._vote = processes.Vote(self._mesh, _IN_FLIGHT)
        self._stopping = False
        self._unread: list[tuple[str, int, str]] = []  # task, position, error; not yet told
        self._boundaries: set[int] = set()  # where segments begin that the loader does not know
        self._completed = time.monotonic()

    def run(self, state: State) -> list[Record] | None:
        """From the session's clock to the last step."""
        schedule, step = self._clock.schedule, self._clock.step
        visits, end = schedule.visits(step), schedule.visits(self._run.steps)
        left = {name: end.get(name, 0) - visits.get(name, 0) for name in self._experiment.tasks}
        tasks = list(self._experiment.tasks)
        progress = Progress(self._run.steps, step, tasks, visits=visits, visits_left=left)
        with (
            Watchdog(self._run.limits.stuck, self._stuck) as self._watchdog,
            self._open_writer(step) as self._writer,
            self._open_checkpoints() as self._checkpoints,
            progress as self._progress,
            self._loading(),
        ):
            return self._stretches(state)

    def _stuck(self, text: str) -> None:
        self._phases.event("stuck", text=text)

    def _open_writer(self, step: int) -> MetricWriter:
        first = processes.is_first()
        return MetricWriter(self._session.workdir, step) if first else MutedMetrics()

    def _open_checkpoints(self) -> Checkpoints:
        bounds = self._run.limits.bounds

        def is_well(meta: Mapping[str, Any]) -> bool:
            return Clock.from_json(meta["clock"]).is_well(bounds)

        return Checkpoints(self._session.workdir, self._run.checkpoint, is_well)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        self._loader = self._open_loader()
        try:
            yield
        finally:
            self._loader.close()

    def _open_loader(self) -> Loader:
        def share(size: int) -> tuple[int, int]:
            return local_rows(batch_sharding(self._mesh, size, "batch"), size)

        tasks, data, seed = self._experiment.tasks, self._session.data, self._run.seed
        return Loader(self._run.loader, tasks, data, self._clock, self._run.steps, seed, share)

    def _stretches(self, state: State) -> list[Record] | None:
        """Steps without a pause, then what is due: a checkpoint, an evaluation.

        A checkpoint of step S comes before the evaluation at S, which a restart from S does again.
        """
        if self._session.was_evaluated and self._clock.step < self._run.steps:
            self._evaluate(state)
        while self._clock.step < self._run.steps and not self._must_stop():
            before = self._clock.step
            if before in self._boundaries:
                self._loader.close()
                self._loader = self._open_loader()
            with self._phases.phase("step", step=before):
                state = self._steps(state, self._next_pause())
            self._tell_unread()
            if self._clock.step > before:
                self._pause(state)
        if self._stopping and self._clock.step < self._run.steps:
            self._save(state)
            self._checkpoints.wait()
            self._progress.message(
                f"Stopped by {self._signals.received or 'another process'}; saved step {self._clock.step}."
            )
            return None
        records = self._evaluate(state)
        self._watchdog.at("saving", step=self._clock.step)
        self._checkpoints.wait()
        if processes.is_first():
            self._write(records)
        return records

    def _write(self, records: list[Record]) -> None:
        write_results(self._session.workdir, records)
        if self._run.log.report:
            self._progress.status("writing report.html")
            self._watchdog.at("writing the report")
            with self._phases.phase("report"):
                write_report(self._session.workdir)

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop; all ask at the same places."""
        self._stopping = self._stopping or self._vote.settle(bool(self._signals.received))
        return self._stopping

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

    def _steps(self, state: State, stop: int) -> State:
        """Dispatch steps up to `stop`, or to a new segment; nothing here may trace, compile or move data unasked."""
        under_way: deque[_Dispatched] = deque()
        before = self._clock.step
        self._completed = time.monotonic()
        with jax.no_tracing(True), jax.transfer_guard("disallow"):
            for step in range(before, stop):
                self._stopping = self._vote.cast(bool(self._signals.received))
                if self._stopping or step in self._boundaries - {before}:
                    break
                task, visit = self._clock.schedule.task(step), self._clock.schedule.visit(step)
                self._watchdog.at("waiting for data", task, step)
                started = time.monotonic()
                host = next(self._loader)
                waited = time.monotonic() - started
                self._watchdog.at("in a step", task, step)
                chosen = self._experiment.tasks[task]
                state, metrics = dispatch(
                    self._programs[task], chosen, self._mesh, state, host, visit
                )
                under_way.append(_Dispatched(step, task, metrics, chosen.batch, waited))
                self._count(task, host)
                if len(under_way) >= _IN_FLIGHT:
                    self._complete(under_way.popleft())
            while under_way:
                self._complete(under_way.popleft())
        return state

    def _count(self, task: str, host: HostBatch) -> None:
        """Move the clock past a dispatched step."""
        positions = Counter(self._clock.positions)
        positions[task] += self._experiment.tasks[task].batch
        self._clock = replace(self._clock, step=host.step + 1, positions=dict(positions))
        self._unread += [(task, position, error) for position, error in host.failed]
        if jax.process_count() == 1:
            self._tell_unread()

    def _tell_unread(self) -> None:
        """Count and name the examples that could not be read, by any process, since the last call."""
        # Processes may share rows: each is counted once.
        found = {(t, p): e for part in processes.gather(self._unread) for t, p, e in part}
        self._unread = []
        if not found:
            return
        invalid = Counter(self._clock.invalid)
        for (task, position), error in sorted(found.items()):
            invalid[task] += 1
            self._tell("invalid example", f"task {task}, position {position}: {error}")
            if invalid[task] > self._run.limits.invalid:
                raise UserError(
                    f"Task '{task}': {invalid[task]} examples could not be read, over limits.invalid = "
                    f"{self._run.limits.invalid}. The last: {error}"
                )
        self._clock = replace(self._clock, invalid=dict(invalid))

    def _complete(self, done: _Dispatched) -> None:
        """Fetch a step's metrics, the next one being under way, and report them."""
        self._watchdog.at("in a step", done.task, done.step)
        values = {name: np.asarray(value) for name, value in jax.device_get(done.metrics).items()}
        now = time.monotonic()
        seconds, self._completed = now - self._completed, now
        finite = bool(values.pop("finite"))
        visit = self._clock.schedule.visit(done.step)
        timing = {"seconds": seconds, "wait": done.waited}
        self._writer.write(done.step, done.task, {"visit": visit, **values}, timing)
        self._phases.add("wait_data", done.waited)
        self._progress.update(done.step, done.task, float(values["loss"]), done.examples, seconds)
        self._judge(done, float(values["loss"]), finite)
        if (done.step + 1) % self._run.log.every == 0:
            self._writer.flush()
            self._phases.beat(step=done.step)

    def _judge(self, done: _Dispatched, loss: float, finite: bool) -> None:
        """Remember how the task fares; name what went wrong, and leave out a task that is not well."""
        bounds = self._run.limits.bounds
        health = self._clock.health.get(done.task, Health()).after(loss, finite, bounds)
        self._clock = replace(self._clock, health={**self._clock.health, done.task: health})
        if not finite:
            self._non_finite(done)
        if done.task in self._clock.quarantined:
            return
        if health.bad >= bounds.non_finite:
            self._quarantine(done, health.bad)
        elif health.has_diverged(bounds):
            words = (
                f"the median of its last {bounds.visits} losses is over {bounds.divergence:g} times that "
                f"of its first {bounds.visits}"
            )
            raise Diverged(done.task, done.step, self._clock.quarantined, words)

    def _non_finite(self, done: _Dispatched) -> None:
        skipped = Counter(self._clock.skipped)
        skipped[done.task] += 1
        self._clock = replace(self._clock, skipped=dict(skipped))
        words = self._examples(done)
        self._tell("non-finite", f"step {done.step}, task {done.task}: no update; examples {words}")

    def _examples(self, done: _Dispatched) -> str:
        ids = self._session.example_ids(done.task, self._clock.schedule.visit(done.step))
        return f"{', '.join(map(str, ids[:16]))}{', ...' if len(ids) > 16 else ''}"

    def _quarantine(self, done: _Dispatched, bad: int) -> None:
        """Leave a task out from the step on that cannot be under way when this one is complete.

        Where that is does not depend on pauses, so that a run that was interrupted does the same.
        """
        start = done.step + _IN_FLIGHT
        tasks = {*self._clock.quarantined, done.task}
        schedule = quarantine(self._clock.schedule, tasks, start, self._clock.step)
        words = f"{bad} steps in a row with a non-finite loss or gradient, up to step {done.step}"
        if schedule is None:
            raise UserError(
                f"Task '{done.task}': {words}, and no other task is left to go on with. "
                f"Lower optimizer.learning_rate, or look at examples {self._examples(done)}."
            )
        quarantined = {**self._clock.quarantined, done.task: start}
        self._clock = replace(self._clock, schedule=schedule, quarantined=quarantined)
        self._boundaries.add(start)
        self._tell("quarantine", f"task {done.task} is left out from step {start} on: {words}")

    def _save(self, state: State) -> None:
        self._progress.status("saving")
        self._watchdog.at("saving", step=self._clock.step)
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
            records = self._evaluation(
                self._programs,
                self._session.evaluated(state),
                lambda task: self._watchdog.at("evaluating", task, self._clock.step),
            )
            self._writer.write_eval(self._clock.step, records)
            self._writer.flush()
        self._checkpoints.evaluated(self._clock.step, records)
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
    processes.add_arguments(made)
    arguments, overrides = commandline.parse(made, argv)
    block = commandline.read_config(arguments.config, overrides)
    processes.join(arguments)
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
