"""Guards of a run: examples that cannot be read, processes that are slow, and tasks that are not well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.core.errors import UserError
from mmjax.data import order
from mmjax.engine import processes
from mmjax.engine.checkpoint import Checkpoints
from mmjax.engine.health import Diverged, Health, broken_at, quarantine
from mmjax.engine.loader import make_batch, process_rows
from mmjax.engine.state import Clock
from mmjax.training.flight import IN_FLIGHT, Completed
from mmjax.training.run_log import RunLog
from mmjax.training.session import Session, newest_good

_NOTICED = 0.1  # share of a step that a process waits for data, from which on it may be called slow


class InvalidExamples:
    """Counts and names the examples that no process could read; an example counts once, whatever the epoch."""

    def __init__(self, session: Session, log: RunLog) -> None:
        self._session, self._log = session, log
        self._unread: list[tuple[str, int, str]] = []  # task, position, error; not yet counted

    def add(self, task: str, failed: Sequence[tuple[int, str]]) -> None:
        """Note (position, error) of examples of a batch."""
        self._unread += [(task, position, error) for position, error in failed]

    def count(self, clock: Clock) -> Clock:
        """Return the clock that also counts what was noted by any process since the last call.

        Raises:
          UserError: a task has more such examples than `limits.max_invalid_examples`.
        """
        # Processes may share rows: each is counted once.
        noted = {(t, p): e for part in processes.gather(self._unread) for t, p, e in part}
        self._unread = []
        seed, limit = (
            self._session.experiment.run.seed,
            self._session.experiment.run.limits.max_invalid_examples,
        )
        for (task, position), error in sorted(noted.items()):
            size = len(self._session.data[task])
            [example] = order.example_ids(seed, task, position, 1, size).tolist()
            before, clock = clock, clock.with_invalid(task, example)
            if clock is before:
                continue
            self._log.event("invalid example", f"task {task}, position {position}: {error}")
            if clock.invalid[task] > limit:
                raise UserError(
                    f"Task '{task}': {clock.invalid[task]} examples could not be read, over "
                    f"limits.max_invalid_examples = {limit}. The last: {error}"
                )
        return clock


def warn_of_slow_process(log: RunLog, waits: Sequence[float], seconds: float) -> None:
    """Warn of the process whose data the others waited for in a stretch of steps, if one stands out.

    Args:
      log: where its name goes.
      waits: seconds that this process waited for the batch of each step of the stretch.
      seconds: of the whole stretch.
    """
    if jax.process_count() == 1:
        return
    later = waits[1:]  # the first one may be of a loader that has just begun
    mean = sum(later) / max(len(later), 1)
    slowest = processes.slowest(mean, _NOTICED * seconds / max(len(waits), 1))
    if slowest:
        index, waited, usual = slowest
        log.event(
            "slow process",
            f"process {index} waits {waited:.3g} s for the data of a step, the others {usual:.3g} s; "
            "all wait for it. Look at its disk, its network and its other work.",
        )


class HealthMonitor:
    """Follows the losses of each task, and excludes a task that is unhealthy."""

    def __init__(self, session: Session, checkpoints: Checkpoints, log: RunLog) -> None:
        self._session, self._checkpoints, self._log = session, checkpoints, log
        self._bounds = session.experiment.run.limits.bounds

    def after(self, clock: Clock, done: Completed) -> Clock:
        """Return the clock that remembers a complete step, perhaps with its task in quarantine.

        Raises:
          Diverged: the run is to go back, and on without a task.
          UserError: no task is left, or the parameters are broken and no checkpoint is from before.
        """
        health = clock.health.get(done.task, Health())
        health = health.after(done.loss, done.is_finite, self._bounds)
        clock = replace(clock, health={**clock.health, done.task: health})
        if not done.is_finite:
            clock = self._skipped(clock, done)
        if done.task in clock.quarantined:
            return clock
        if health.consecutive_non_finite >= self._bounds.non_finite:
            broken = broken_at(clock.schedule, clock.health, done.step)
            if broken is not None:
                self._give_up(clock, done, broken)
            return self._quarantined(clock, done, health.consecutive_non_finite)
        if health.has_diverged(self._bounds):
            visits, ratio = self._bounds.visits, self._bounds.divergence
            text = (
                f"the median of its last {visits} losses is over {ratio:g} times that "
                f"of its first {visits}"
            )
            raise Diverged(done.task, done.step, clock.quarantined, text)
        return clock

    def _skipped(self, clock: Clock, done: Completed) -> Clock:
        skipped = Counter(clock.skipped)
        skipped[done.task] += 1
        text = (
            f"step {done.step}, task {done.task}: no update; examples {self._examples(clock, done)}"
        )
        self._log.event("non-finite", text)
        return replace(clock, skipped=dict(skipped))

    def _give_up(self, clock: Clock, done: Completed, broken: int) -> NoReturn:
        """Raise: the update of step `broken` has broken the parameters, so that no task has a finite loss.

        Without that step's task the run may continue from an earlier checkpoint. Where there is none, the rate is
        too high for all of them.
        """
        text = (
            f"no task has had a finite loss and gradient from step {broken + 1} to step {done.step}"
        )
        self._checkpoints.wait()  # whether there is one must not depend on how quickly it is written
        may_go_back = self._bounds.divergence > 0 and broken >= 0
        if may_go_back and newest_good(self._session, broken) is not None:
            task = clock.schedule.task(broken)
            raise Diverged(task, done.step, clock.quarantined, text, before=broken)
        raise UserError(
            f"The parameters are not finite: {text}, and no checkpoint precedes it. Lower optimizer.learning_rate, "
            f"or look at examples {self._examples(clock, done)}."
        )

    def _quarantined(self, clock: Clock, done: Completed, bad: int) -> Clock:
        """Leave a task out from the step on that cannot be under way when this one is complete.

        Where that is does not depend on pauses, so that a run that was interrupted does the same.
        """
        start = done.step + IN_FLIGHT
        tasks = {*clock.quarantined, done.task}
        schedule = quarantine(clock.schedule, tasks, start, clock.step)
        text = f"{bad} steps in a row with a non-finite loss or gradient, up to step {done.step}"
        if schedule is None:
            raise UserError(
                f"Task '{done.task}': {text}, and no other task is left to continue with. "
                f"Lower optimizer.learning_rate, or look at examples {self._examples(clock, done)}."
            )
        self._log.event("quarantine", f"task {done.task} is excluded from step {start} on: {text}")
        quarantined = {**clock.quarantined, done.task: start}
        return replace(clock, schedule=schedule, quarantined=quarantined)

    def _examples(self, clock: Clock, done: Completed) -> str:
        """Return the examples of a step, and which inputs of theirs are not finite."""
        position, ids = self._session.example_ids(clock.schedule, done.task, done.step)
        inputs = "".join(f"; {text}" for text in self._non_finite(clock, done, position, ids))
        return f"{', '.join(map(str, ids[:16]))}{', ...' if len(ids) > 16 else ''}{inputs}"

    def _non_finite(
        self, clock: Clock, done: Completed, position: int, ids: Sequence[int]
    ) -> Iterator[str]:
        """Read this process's rows of a step again; yield the arrays that are not finite, with an example of each."""
        session, schedule = self._session, clock.schedule
        phases, visit = session.experiment.phases, schedule.visit(done.step)
        task = phases.variant(done.task, done.step, visit).task
        first, last = process_rows(session.mesh)(task.batch)

        def rng(row: int) -> np.random.Generator:
            return order.rng(session.experiment.run.seed, task.name, position + first + row)

        local_ids = ids[first:last]
        rows, _ = make_batch(task.rows(), session.data[task.name], local_ids, rng, len(local_ids))
        for modality, arrays in rows.inputs.items():
            for name, array in arrays.items():
                if jnp.issubdtype(array.dtype, jnp.floating):
                    yield from _fault(f"inputs.{modality}.{name}", array, local_ids)


def _fault(name: str, array: np.ndarray, ids: Sequence[int]) -> Iterator[str]:
    """Yield a line for an array `[B, ...]` that is not finite: the first such row's example, and what it holds."""
    flat = array.reshape(len(array), -1).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
    if len(bad):
        what = "NaN" if np.isnan(flat[bad[0]]).any() else "an infinite number"
        yield f"{name} of example {ids[bad[0]]} holds {what}"
