"""The loop over the steps of a run: stretches of steps, and what is due between them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax

from mmjax.engine import processes
from mmjax.engine.checkpoint import Checkpoints
from mmjax.engine.compile import Program
from mmjax.engine.loader import HostBatch, Loader, process_rows
from mmjax.engine.profiling import Profile
from mmjax.engine.state import Clock, State
from mmjax.evaluators.base import Record
from mmjax.monitor.goodput import ActivityLog
from mmjax.task import Task
from mmjax.training.evaluation import Evaluation, after, write_results
from mmjax.training.flight import IN_FLIGHT, Flight
from mmjax.training.guards import HealthMonitor, InvalidExamples, warn_of_slow_process
from mmjax.training.rebalance import Budget
from mmjax.training.run_log import RunLog
from mmjax.training.session import Session
from mmjax.training.signals import Signals


class Loop:
    """The steps of a session from its clock on."""

    def __init__(
        self,
        session: Session,
        programs: Mapping[str, Program],
        evaluation: Evaluation,
        activities: ActivityLog,
        signals: Signals,
    ):
        self._session, self._programs, self._evaluation = session, programs, evaluation
        self._experiment, self._run = session.experiment, session.experiment.run
        self._mesh, self._clock, self._signals = session.mesh, session.clock, signals
        self._log = RunLog(session, programs, activities)
        self._budget = Budget(self._experiment, session.workdir)
        self._invalid = InvalidExamples(session, self._log)
        self._vote, self._stopping = processes.Vote(self._mesh, IN_FLIGHT), False
        self._boundaries: set[int] = set()  # where segments begin that the loader does not know
        self._waits: list[float] = []  # seconds for the batch of each step of this stretch

    def run(self, state: State) -> list[Record] | None:
        """Run to the last step: return the records of the last evaluation, or None if a signal came first.

        A checkpoint of step S comes before the evaluation at S, which a restart from S does again.

        Raises:
          Diverged: a task's losses have left all bounds.
        """
        with ExitStack() as stack:
            stack.enter_context(self._log)
            self._checkpoints = stack.enter_context(self._open_checkpoints())
            self._health = HealthMonitor(self._session, self._checkpoints, self._log)
            self._profile = stack.enter_context(Profile(self._run.profile, self._session.workdir))
            self._loader = self._open_loader()
            stack.callback(lambda: self._loader.close())
            if self._budget.is_boundary(self._clock.step):
                self._rebalance()  # not yet done where a shorter run ended; else this changes nothing
            is_left = self._clock.step < self._run.steps
            if self._session.was_evaluated and is_left and not self._must_stop():
                self._evaluate(state)
            while self._clock.step < self._run.steps and not self._must_stop():
                state = self._stretch(state)
                self._pause(state)
            if self._clock.step < self._run.steps:
                self._stop(state)
                return None
            return self._finish(state)

    def _open_checkpoints(self) -> Checkpoints:
        bounds = self._run.limits.bounds

        def is_healthy(meta: Mapping[str, Any]) -> bool:
            return Clock.from_json(meta["clock"]).is_healthy(bounds)

        return Checkpoints(self._session.workdir, self._run.checkpoint, is_healthy)

    def _open_loader(self) -> Loader:
        """Open batches up to the last step of which it is settled which task it runs."""
        phases, data, seed = self._experiment.phases, self._session.data, self._run.seed
        rows = process_rows(self._mesh)
        return Loader(self._run.loader, phases, data, self._clock, self._settled(), seed, rows)

    def _settled(self) -> int:
        """Return the step up to which the schedule is settled: all of the run, but for shares by measured times."""
        return self._budget.next(self._clock.step) or self._run.steps

    def _must_stop(self) -> bool:
        """Return whether any process was asked to stop; all ask at the same places."""
        self._stopping = self._stopping or self._vote.settle(bool(self._signals.received))
        return self._stopping

    # --- a stretch of steps ---

    def _stretch(self, state: State) -> State:
        """Run steps without a pause."""
        if self._clock.step in self._boundaries:
            self._loader.close()
            self._loader = self._open_loader()
        self._profile.at(self._clock.step)
        started = time.monotonic()
        with self._log.steps(self._clock.step):
            state = self._steps(state, self._next_pause())
        self._clock = self._invalid.count(self._clock)
        warn_of_slow_process(self._log, self._waits, time.monotonic() - started)
        return state

    def _next_pause(self) -> int:
        step = self._clock.step
        intervals = (self._run.checkpoint.every, self._run.evaluation.every)
        due = [(step // every + 1) * every for every in intervals if every]
        return min([self._settled(), *due, *self._profile.next(step)])

    def _steps(self, state: State, stop: int) -> State:
        """Run steps up to `stop`, or to a new segment; nothing here may trace, compile or move data unasked."""
        self._began, self._waits = self._clock.step, []
        flight = Flight(self._programs, self._mesh)
        with jax.no_tracing(True), jax.transfer_guard("disallow"):
            for step in range(self._began, stop):
                self._stopping = self._vote.cast(bool(self._signals.received))
                if self._stopping or step in self._boundaries - {self._began}:
                    break
                state = self._send(flight, state, step)
                if flight.is_full:
                    self._complete(flight)
            while flight:
                self._complete(flight)
        return state

    def _send(self, flight: Flight, state: State, step: int) -> State:
        """Give a step to the devices, and move the clock past it."""
        schedule, phases = self._clock.schedule, self._experiment.phases
        task, visit = schedule.task(step), schedule.visit(step)
        positions = self._clock.positions
        progress = self._experiment.optimizers.progress(task, step, positions, schedule)
        self._log.alive("waiting for data", task, step)
        started = time.monotonic()
        host = next(self._loader)
        self._waits.append(time.monotonic() - started)
        self._log.alive("in a step", task, step)
        variant = phases.variant(task, step, visit)
        state = flight.send(state, host, variant, {"visit": visit, **progress}, self._waits[-1])
        self._advance(variant.task, host)
        return state

    def _advance(self, task: Task, host: HostBatch) -> None:
        positions = Counter(self._clock.positions)
        positions[task.name] += task.batch
        self._clock = replace(self._clock, step=host.step + 1, positions=dict(positions))
        self._invalid.add(task.name, host.failed)
        if jax.process_count() == 1:
            self._clock = self._invalid.count(self._clock)

    def _complete(self, flight: Flight) -> None:
        """Wait for the oldest step, write down what it did, and look how its task fares."""
        self._log.alive("in a step", *flight.oldest)
        done = flight.complete()
        self._log.step(done, self._clock.schedule.visit(done.step))
        before, self._clock = self._clock, self._health.after(self._clock, done)
        if self._clock.quarantined != before.quarantined:
            self._boundaries.add(self._clock.quarantined[done.task])
            self._log.plan(self._clock)
        self._log.beat(done.step)

    # --- between stretches ---

    def _pause(self, state: State) -> None:
        """Do what is due after a stretch: new shares, a checkpoint, an evaluation."""
        step, last = self._clock.step, self._run.steps
        if step == self._began:
            return  # stopped before its first step
        if step < last and self._budget.is_boundary(step):
            self._rebalance()
        if step == last or self._is_due(self._run.checkpoint.every):
            self._save(state)
        # A run that is to stop leaves the evaluation to its restart.
        if step < last and not self._stopping and self._is_due(self._run.evaluation.every):
            self._evaluate(state)

    def _is_due(self, every: int) -> bool:
        return bool(every) and self._clock.step % every == 0

    def _rebalance(self) -> None:
        """Set the shares of steps from the step times so far."""
        self._log.flush()
        self._boundaries.add(self._clock.step)
        before, self._clock = self._clock, self._budget.settle(self._clock)
        if self._clock is not before:
            weights = self._clock.schedule.segment(self._clock.step).weights
            text = ", ".join(f"{task} {weight}" for task, weight in weights.items())
            self._log.event("new shares", f"from step {self._clock.step} on: {text}")
            self._log.plan(self._clock)

    def _save(self, state: State) -> None:
        step = self._clock.step
        with self._log.activity("save", "saving", step):
            # A checkpoint must not know of a step whose line could still be lost.
            self._log.flush()
            self._checkpoints.wait()
            self._session.check_lease()
            arrays, meta = self._session.canonical(state), self._session.meta(self._clock)
            self._checkpoints.save(step, arrays, meta)

    def _wait_for_save(self) -> None:
        with self._log.activity("save", "saving", self._clock.step):
            self._checkpoints.wait()

    def _evaluate(self, state: State) -> list[Record]:
        step = self._clock.step
        with self._log.activity("eval", "evaluating", step):
            records = self._evaluation(
                self._programs,
                self._session.evaluated(state),
                lambda task: self._log.alive("evaluating", task, step),
            )
            self._log.evaluated(step, records)
        self._checkpoints.evaluated(step, records)
        return records

    # --- the end ---

    def _stop(self, state: State) -> None:
        """Save a run that was asked to stop."""
        self._save(state)
        self._wait_for_save()
        self._log.sum_up(self._clock.step)
        by = self._signals.received or "another process"
        self._log.message(f"Stopped by {by}; saved step {self._clock.step}.")

    def _finish(self, state: State) -> list[Record]:
        """Evaluate a run after its last step, and write its results."""
        records = after(self._clock.step, self._evaluate(state))
        self._wait_for_save()
        self._log.sum_up(self._clock.step)
        if processes.is_first():
            self._session.check_lease()
            write_results(self._session.workdir, records)
        return records
