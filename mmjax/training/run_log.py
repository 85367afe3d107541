"""The log of a run: metrics, activities, progress and events, and signs of life for the watchdog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

from mmjax.core.chips import peak_flops
from mmjax.engine import processes
from mmjax.engine.compile import Program
from mmjax.engine.state import Clock
from mmjax.engine.watchdog import Watchdog
from mmjax.evaluators.base import Record, evaluators_of
from mmjax.monitor import summary
from mmjax.monitor.goodput import ActivityLog
from mmjax.monitor.metrics import MetricWriter
from mmjax.monitor.null import NullMetrics
from mmjax.monitor.progress import Progress
from mmjax.monitor.wandb import WandbRun
from mmjax.training.flight import Completed
from mmjax.training.session import Session


class RunLog:
    """Writes and shows the course of a run, to be used in a `with` block.

    Process 0 writes the files; all processes feed their own watchdog.

    Args:
      session: the run as it begins.
      programs: the compiled programs, whose reports state what a step costs.
      activities: the log of activities and events, which outlives this one.
    """

    def __init__(
        self, session: Session, programs: Mapping[str, Program], activities: ActivityLog
    ) -> None:
        self._session, self._programs, self._activities = session, programs, activities
        self._run, clock = session.experiment.run, session.clock
        chip = peak_flops(session.mesh.devices.flat[0].device_kind)
        self._peak = None if chip is None else chip * session.mesh.devices.size
        self._tasks = list(session.experiment.tasks)
        visits = clock.schedule.visits(clock.step)
        self._progress = Progress(self._run.steps, clock.step, self._tasks, visits=visits)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            watchdog = Watchdog(self._run.limits.watchdog_seconds, self._stuck)
            self._watchdog = stack.enter_context(watchdog)
            self._writer = stack.enter_context(self._open_writer())
            stack.enter_context(self._progress)
            self._stack = stack.pop_all()
        self.plan(self._session.clock)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.__exit__(*raised)

    def _stuck(self, text: str) -> None:
        self._activities.event("stuck", text=text)

    def _open_writer(self) -> MetricWriter:
        if not processes.is_first():
            return NullMetrics()
        session, project = self._session, self._run.log.wandb
        sinks = [WandbRun(project, session.workdir, session.experiment.block)] if project else []
        return MetricWriter(session.workdir, session.clock.step, sinks, session.check_lease)

    def plan(self, clock: Clock) -> None:
        """Show how many steps each task has left, which a change of the schedule changes."""
        left = clock.schedule.between(clock.step, max(clock.step, self._run.steps))
        self._progress.plan({name: left.get(name, 0) for name in self._tasks})

    def event(self, name: str, text: str) -> None:
        """Note an event in the log of activities, and show it."""
        self._activities.event(name, text=text)
        self._progress.message(f"{name}: {text}")

    def message(self, text: str) -> None:
        """Show a line."""
        self._progress.message(text)

    def activity(self, name: str, status: str, step: int) -> AbstractContextManager[None]:
        """Begin a pause between steps, whose time counts as activity `name`, to be used in a `with` block."""
        self._progress.status(status)
        self.alive(status, step=step)
        return self._activities.activity(name, step=step)

    def steps(self, step: int) -> AbstractContextManager[None]:
        """Begin a stretch of steps, to be used in a `with` block."""
        return self._activities.activity("step", step=step)

    def alive(self, doing: str, task: str = "", step: int | None = None) -> None:
        """Give the watchdog a sign of life: what begins now."""
        self._watchdog.at(doing, task, step)

    def flush(self) -> None:
        """Make sure that the lines of metrics are on the disk."""
        self._writer.flush()

    def step(self, done: Completed, visit: int) -> None:
        """Write the metrics of a complete step, and show it."""
        report = self._programs[done.variant.program].report
        timing = {"seconds": done.seconds, "wait": done.waited}
        timing |= summary.rates(report["flops"], done.seconds, self._peak)
        if done.busy is not None:
            timing["busy"] = done.busy
        examples = done.variant.task.batch
        bucket = {"bucket": done.variant.shape} if done.variant.shape else {}
        counts = {**bucket, "visit": visit, "examples": examples, "tokens": report["tokens"]}
        self._writer.write(done.step, done.task, {**counts, **done.metrics}, timing)
        self._activities.add("wait_data", done.waited)
        self._progress.update(done.step, done.task, done.loss, examples, done.seconds)

    def beat(self, step: int) -> None:
        """Flush the metrics after every `log.flush_every` steps, and note how far the run is."""
        if (step + 1) % self._run.log.flush_every == 0:
            self._writer.flush()
            self._activities.beat(step=step)

    def evaluated(self, step: int, records: Sequence[Record]) -> None:
        """Write the records of an evaluation."""
        self._writer.write_eval(step, records)
        self._writer.flush()

    def sum_up(self, step: int) -> None:
        """Write what the run did and cost, over all its attempts; only process 0 does."""
        if not processes.is_first():
            return
        self._writer.flush()
        self._activities.beat(step=step)
        workdir = self._session.workdir
        flops = {name: float(program.report["flops"]) for name, program in self._programs.items()}
        totals = summary.summary(workdir, flops, self._peak)
        totals["evaluators"] = evaluators_of(self._session.experiment.block)
        summary.write(workdir, totals)
        self._writer.add(step, summary.scalars(totals))
