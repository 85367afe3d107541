"""The loop over the steps of a run: dispatch, count, report, and what is due between steps."""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax.core.chips import peak_flops
from mmjax.core.errors import UserError
from mmjax.core.sharding import batch_sharding
from mmjax.data import order
from mmjax.engine import processes
from mmjax.engine.checkpoint import Checkpoints
from mmjax.engine.compile import Program
from mmjax.engine.health import Diverged, Health, broken_at, quarantine
from mmjax.engine.loader import HostBatch, Loader, local_rows, place
from mmjax.engine.profiling import Profile
from mmjax.engine.state import Clock, State
from mmjax.engine.steps import ticks
from mmjax.engine.watchdog import Watchdog
from mmjax.evaluators.base import Record, evaluators_of
from mmjax.monitor import summary
from mmjax.monitor.goodput import PhaseLog
from mmjax.monitor.metrics import MetricWriter
from mmjax.monitor.null import MutedMetrics
from mmjax.monitor.progress import Progress
from mmjax.monitor.wandb import WandbRun
from mmjax.schedule.buckets import Variant
from mmjax.task import Task
from mmjax.training.evaluation import Evaluation, after, write_results
from mmjax.training.rebalance import Budget
from mmjax.training.session import Session, newest_good

_NOTICED = 0.1  # share of a step that a process waits for data, from which on it may be called slow
_IN_FLIGHT = 2  # hundreds of steps in flight abort a run on many CPU devices


def dispatch(
    program: Program,
    task: Task,
    mesh: Mesh,
    state: State,
    host: HostBatch,
    clock: Mapping[str, float],
) -> tuple[State, Mapping[str, jax.Array]]:
    """Begin one step of a task: its batch to the mesh, then its program. `state` is consumed.

    `clock` holds the ticks besides the step: the visit, and what the learning rate asks for.
    """
    sharding = batch_sharding(mesh, task.batch, f"tasks.{task.name}")
    batch = place(host.rows, host.start, task.batch, sharding)
    with jax.profiler.StepTraceAnnotation(task.name, step_num=host.step):
        after, metrics = program.call(state, batch, ticks(mesh, step=host.step, **clock))
    return after, metrics


class Signals:
    """Notes SIGTERM and SIGINT, so that the loop can save before it ends; before it they just end it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
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
    """A step under way: its metrics are still on the devices.

    Attributes:
      variant: what ran.
      waited: seconds that the loop waited for its batch.
      sent: when it was given to the devices.
    """

    step: int
    task: str
    variant: Variant
    metrics: Mapping[str, jax.Array]
    waited: float
    sent: float


class Loop:
    """The steps of a session from its clock on, with one place for each side effect."""

    def __init__(
        self,
        session: Session,
        programs: Mapping[str, Program],
        evaluation: Evaluation,
        phases: PhaseLog,
        signals: Signals,
    ):
        self._session, self._programs, self._evaluation = session, programs, evaluation
        self._experiment, self._run = session.experiment, session.experiment.run
        self._mesh, self._clock, self._phases = session.mesh, session.clock, phases
        self._signals, self._stopping = signals, False
        self._vote = processes.Vote(self._mesh, _IN_FLIGHT)
        self._budget = Budget(self._experiment, session.workdir)
        chip = peak_flops(self._mesh.devices.flat[0].device_kind)
        self._peak = None if chip is None else chip * self._mesh.devices.size
        self._unread: list[tuple[str, int, str]] = []  # task, position, error; not yet told
        self._boundaries: set[int] = set()  # where segments begin that the loader does not know
        self._completed = time.monotonic()
        self._waits: list[float] = []  # seconds for the batch of each step of this stretch

    def run(self, state: State) -> list[Record] | None:
        """To the last step: the records of the last evaluation, or None if a signal came first.

        Raises:
          Diverged: a task's losses have left all bounds.
        """
        tasks = list(self._experiment.tasks)
        visits = self._clock.schedule.visits(self._clock.step)
        progress = Progress(self._run.steps, self._clock.step, tasks, visits=visits)
        with (
            Watchdog(self._run.limits.stuck, self._stuck) as self._watchdog,
            self._open_writer() as self._writer,
            self._open_checkpoints() as self._checkpoints,
            Profile(self._run.profile, self._session.workdir) as self._profile,
            progress as self._progress,
            self._loading(),
        ):
            self._plan()
            return self._stretches(state)

    def _stuck(self, text: str) -> None:
        self._phases.event("stuck", text=text)

    def _open_writer(self) -> MetricWriter:
        if not processes.is_first():
            return MutedMetrics()
        workdir, project = self._session.workdir, self._run.log.wandb
        sinks = [WandbRun(project, workdir, self._experiment.block)] if project else []
        return MetricWriter(workdir, self._clock.step, sinks, self._session.check_lease)

    def _open_checkpoints(self) -> Checkpoints:
        bounds = self._run.limits.bounds

        def is_well(meta: Mapping[str, Any]) -> bool:
            return Clock.from_json(meta["clock"]).is_well(bounds)

        return Checkpoints(self._session.workdir, self._run.checkpoint, is_well)

    def _plan(self) -> None:
        step = self._clock.step
        left = self._clock.schedule.between(step, max(step, self._run.steps))
        self._progress.plan({name: left.get(name, 0) for name in self._experiment.tasks})

    @contextmanager
    def _loading(self) -> Iterator[None]:
        self._loader = self._open_loader()
        try:
            yield
        finally:
            self._loader.close()

    def _open_loader(self) -> Loader:
        """Batches up to the last step of which it is settled which task it runs."""

        def share(size: int) -> tuple[int, int]:
            return local_rows(batch_sharding(self._mesh, size, "batch"), size)

        settings, data, seed = self._experiment.settings, self._session.data, self._run.seed
        return Loader(self._run.loader, settings, data, self._clock, self._settled(), seed, share)

    def _settled(self) -> int:
        return self._budget.next(self._clock.step) or self._run.steps

    def _stretches(self, state: State) -> list[Record] | None:
        """Steps without a pause, then what is due: new shares, a checkpoint, an evaluation.

        A checkpoint of step S comes before the evaluation at S, which a restart from S does again.
        """
        if self._budget.is_boundary(self._clock.step):
            self._settle()  # not yet done where a shorter run ended; else this changes nothing
        has_begun = self._session.was_evaluated and self._clock.step < self._run.steps
        if has_begun and not self._must_stop():
            self._evaluate(state)
        while self._clock.step < self._run.steps and not self._must_stop():
            state = self._stretch(state)
        if self._stopping and self._clock.step < self._run.steps:
            self._save(state)
            self._wait_for_save()
            if processes.is_first():
                self._sum_up()
            self._progress.message(
                f"Stopped by {self._signals.received or 'another process'}; saved step {self._clock.step}."
            )
            return None
        records = after(self._clock.step, self._evaluate(state))
        self._wait_for_save()
        if processes.is_first():
            self._write(records)
        return records

    def _stretch(self, state: State) -> State:
        before, settled = self._clock.step, self._settled()
        if before in self._boundaries:
            self._loader.close()
            self._loader = self._open_loader()
        self._profile.at(before)
        started = time.monotonic()
        with self._phases.phase("step", step=before):
            state = self._steps(state, self._next_pause())
        self._tell_unread()
        self._tell_slow(time.monotonic() - started)
        if self._clock.step > before:
            self._pause(state, settle=self._clock.step == settled)
        return state

    def _write(self, records: list[Record]) -> None:
        self._sum_up()
        self._session.check_lease()
        write_results(self._session.workdir, records)

    def _sum_up(self) -> None:
        """Write what the run did and cost, over all its attempts."""
        self._writer.flush()
        self._phases.beat(step=self._clock.step)
        flops = {name: float(program.report["flops"]) for name, program in self._programs.items()}
        found = summary.summary(self._session.workdir, flops, self._peak)
        found["evaluators"] = evaluators_of(self._experiment.block)
        summary.write(self._session.workdir, found)
        self._writer.add(self._clock.step, summary.scalars(found))

    def _must_stop(self) -> bool:
        """Whether any process was asked to stop; all ask at the same places."""
        self._stopping = self._stopping or self._vote.settle(bool(self._signals.received))
        return self._stopping

    def _pause(self, state: State, settle: bool) -> None:
        last = self._clock.step == self._run.steps
        if settle and not last:
            self._settle()
        if last or self._is_due(self._run.checkpoint.every):
            self._save(state)
        # A run that is to stop leaves the evaluation to its restart.
        if not last and not self._stopping and self._is_due(self._run.evaluation.every):
            self._evaluate(state)

    def _is_due(self, every: int) -> bool:
        return bool(every) and self._clock.step % every == 0

    def _next_pause(self) -> int:
        step = self._clock.step
        paces = (self._run.checkpoint.every, self._run.evaluation.every)
        due = [(step // every + 1) * every for every in paces if every]
        return min([self._settled(), *due, *self._profile.next(step)])

    def _steps(self, state: State, stop: int) -> State:
        """Dispatch steps up to `stop`, or to a new segment; nothing here may trace, compile or move data unasked."""
        under_way: deque[_Dispatched] = deque()
        before, self._waits = self._clock.step, []
        self._completed = time.monotonic()
        with jax.no_tracing(True), jax.transfer_guard("disallow"):
            for step in range(before, stop):
                self._stopping = self._vote.cast(bool(self._signals.received))
                if self._stopping or step in self._boundaries - {before}:
                    break
                task, visit = self._clock.schedule.task(step), self._clock.schedule.visit(step)
                progress = self._experiment.progress(task, step, self._clock.positions)
                self._watchdog.at("waiting for data", task, step)
                started = time.monotonic()
                host = next(self._loader)
                waited = time.monotonic() - started
                self._waits.append(waited)
                self._watchdog.at("in a step", task, step)
                variant = self._experiment.settings.variant(task, step, visit)
                program = self._programs[variant.program]
                state, metrics = dispatch(
                    program, variant.task, self._mesh, state, host, {"visit": visit, **progress}
                )
                sent = time.monotonic()
                under_way.append(_Dispatched(step, task, variant, metrics, waited, sent))
                self._count(variant.task, host)
                if len(under_way) >= _IN_FLIGHT:
                    self._complete(under_way.popleft())
            while under_way:
                self._complete(under_way.popleft())
        return state

    def _count(self, task: Task, host: HostBatch) -> None:
        """Move the clock past a dispatched step."""
        positions = Counter(self._clock.positions)
        positions[task.name] += task.batch
        self._clock = replace(self._clock, step=host.step + 1, positions=dict(positions))
        self._unread += [(task.name, position, error) for position, error in host.failed]
        if jax.process_count() == 1:
            self._tell_unread()

    def _tell_unread(self) -> None:
        """Count and name the examples that could not be read, by any process, since the last call.

        An example counts once, in whatever epoch it is met.
        """
        # Processes may share rows: each is counted once.
        found = {(t, p): e for part in processes.gather(self._unread) for t, p, e in part}
        self._unread = []
        for (task, position), error in sorted(found.items()):
            count = len(self._session.data[task])
            [example] = order.example_ids(self._run.seed, task, position, 1, count).tolist()
            before, self._clock = self._clock, self._clock.with_invalid(task, example)
            if self._clock is before:
                continue
            self._tell("invalid example", f"task {task}, position {position}: {error}")
            if self._clock.invalid[task] > self._run.limits.invalid:
                raise UserError(
                    f"Task '{task}': {self._clock.invalid[task]} examples could not be read, over limits.invalid = "
                    f"{self._run.limits.invalid}. The last: {error}"
                )

    def _tell_slow(self, seconds: float) -> None:
        """Name the process that the others waited for in this stretch of `seconds`, if one stands out."""
        if jax.process_count() == 1:
            return
        waits = self._waits[1:]  # the first one may be of a loader that has just begun
        mean = sum(waits) / max(len(waits), 1)
        found = processes.slowest(mean, _NOTICED * seconds / max(len(self._waits), 1))
        if found:
            index, own, usual = found
            self._tell(
                "slow process",
                f"process {index} waits {own:.3g} s for the data of a step, the others {usual:.3g} s; "
                "all wait for it. Look at its disk, its network and its other work.",
            )

    def _complete(self, done: _Dispatched) -> None:
        """Fetch a step's metrics, the next one being under way, and report them."""
        self._watchdog.at("in a step", done.task, done.step)
        loss: Any = done.metrics["loss"]
        is_late = loss.is_ready()  # it ended at an unknown time before
        values = {name: np.asarray(value) for name, value in jax.device_get(done.metrics).items()}
        before, self._completed = self._completed, time.monotonic()
        seconds = self._completed - before
        finite = bool(values.pop("finite"))
        report = self._programs[done.variant.program].report
        timing = {"seconds": seconds, "wait": done.waited}
        timing |= summary.rates(report["flops"], seconds, self._peak)
        if not is_late:
            timing["busy"] = self._completed - max(done.sent, before)
        visit = self._clock.schedule.visit(done.step)
        bucket = {"bucket": done.variant.bucket} if done.variant.bucket else {}
        counts = {
            **bucket,
            "visit": visit,
            "examples": done.variant.task.batch,
            "tokens": report["tokens"],
        }
        self._writer.write(done.step, done.task, {**counts, **values}, timing)
        self._phases.add("wait_data", done.waited)
        self._progress.update(
            done.step, done.task, float(values["loss"]), done.variant.task.batch, seconds
        )
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
            broken = broken_at(self._clock.schedule, self._clock.health, done.step)
            if broken is not None:
                self._give_up(done, broken)
            self._quarantine(done, health.bad)
        elif health.has_diverged(bounds):
            words = (
                f"the median of its last {bounds.visits} losses is over {bounds.divergence:g} times that "
                f"of its first {bounds.visits}"
            )
            raise Diverged(done.task, done.step, self._clock.quarantined, words)

    def _give_up(self, done: _Dispatched, broken: int) -> NoReturn:
        """Raise: the update of step `broken` has broken the parameters, so that no task has a finite loss.

        Without that step's task the run may continue from an earlier checkpoint. Where there is none, the rate is
        too high for all of them.
        """
        words = (
            f"no task has had a finite loss and gradient from step {broken + 1} to step {done.step}"
        )
        self._checkpoints.wait()  # whether there is one must not depend on how quickly it is written
        may_go_back = self._run.limits.divergence > 0 and broken >= 0
        if may_go_back and newest_good(self._session, broken) is not None:
            task = self._clock.schedule.task(broken)
            raise Diverged(task, done.step, self._clock.quarantined, words, before=broken)
        raise UserError(
            f"The parameters are broken: {words}, and no checkpoint is from before. Lower optimizer.learning_rate, "
            f"or look at examples {self._examples(done)}."
        )

    def _non_finite(self, done: _Dispatched) -> None:
        skipped = Counter(self._clock.skipped)
        skipped[done.task] += 1
        self._clock = replace(self._clock, skipped=dict(skipped))
        words = self._examples(done)
        self._tell("non-finite", f"step {done.step}, task {done.task}: no update; examples {words}")

    def _examples(self, done: _Dispatched) -> str:
        ids = self._session.example_ids(done.task, done.step)
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
        self._plan()

    def _settle(self) -> None:
        """Shares of steps anew, from the step times so far."""
        self._writer.flush()
        self._boundaries.add(self._clock.step)
        before, self._clock = self._clock, self._budget.settle(self._clock)
        if self._clock is not before:
            weights = self._clock.schedule.segment(self._clock.step).weights
            words = ", ".join(f"{task} {weight}" for task, weight in weights.items())
            self._tell("new shares", f"from step {self._clock.step} on: {words}")
            self._plan()

    def _save(self, state: State) -> None:
        self._progress.status("saving")
        self._watchdog.at("saving", step=self._clock.step)
        with self._phases.phase("save", step=self._clock.step):
            # A checkpoint must not know of a step whose line could still be lost.
            self._writer.flush()
            self._checkpoints.wait()
            self._session.check_lease()
            self._checkpoints.save(
                self._clock.step, self._session.canonical(state), self._session.meta(self._clock)
            )

    def _wait_for_save(self) -> None:
        self._progress.status("saving")
        self._watchdog.at("saving", step=self._clock.step)
        with self._phases.phase("save", step=self._clock.step):
            self._checkpoints.wait()

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
