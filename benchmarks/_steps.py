"""Training steps outside a run: the library's own programs, loader and two steps in flight."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from mmjax.core.config import Block
from mmjax.core.parameters import Arrays
from mmjax.core.sharding import make_mesh
from mmjax.engine.compile import Program, compile_all
from mmjax.engine.loader import HostBatch, Loader, process_rows
from mmjax.engine.requests import train_requests
from mmjax.experiment import Experiment, make_experiment
from mmjax.schedule.rules.base import rule_of
from mmjax.training.flight import dispatch
from mmjax.training.initial_state import initial_state
from mmjax.training.session import Session, begin


@dataclass(frozen=True)
class Timed:
    """Some steps in a row.

    Attributes:
      seconds: from the end of the step before the first to the end of the last.
      host: seconds of each that the host spent giving it to the devices, waiting for data excluded.
      metrics: of the last.
    """

    seconds: float
    host: tuple[float, ...]
    metrics: Mapping[str, Any]


class Steps:
    """Takes steps of a config, one after the other, on one state that it keeps."""

    def __init__(self, block: Block) -> None:
        self.experiment: Experiment = make_experiment(block)
        self._mesh = make_mesh(self.experiment.run.mesh)
        with tempfile.TemporaryDirectory() as workdir:
            folder = epath.Path(workdir)
            self._session: Session = begin(self.experiment, folder, self._mesh, False, print)
        requests, limits = train_requests(self.experiment, self._mesh), self.experiment.run.limits
        self._programs: dict[str, Program] = compile_all(requests, self._mesh, limits)
        self._state: Any = initial_state(self.experiment, self._mesh, self._session.start)

    @property
    def session(self) -> Session:
        return self._session

    @property
    def parameters(self) -> Arrays:
        """Return them as they are now, by name."""
        result: Arrays = self._state.parameters
        return result

    @contextmanager
    def loader(self, start: int, stop: int) -> Iterator[Loader]:
        """Yield the real loader of steps [start, stop), as it stands when a run resumes from `start`."""

        run, phases, schedule = (
            self.experiment.run,
            self.experiment.phases,
            self.session.clock.schedule,
        )
        positions = {t: phases.consumed(schedule, t, 0, start) for t in self.experiment.tasks}
        clock = replace(self.session.clock, step=start, positions=positions)
        made = Loader(
            run.loader, phases, self.session.data, clock, stop, run.seed, process_rows(self._mesh)
        )
        try:
            yield made
        finally:
            made.close()

    def batches(self, start: int, stop: int) -> list[HostBatch]:
        """Return the batches of steps [start, stop), held in memory."""
        with self.loader(start, stop) as loader:
            return list(loader)

    def run(self, batches: Iterable[tuple[str, HostBatch]], untimed: int) -> Timed:
        """Train on batches (task, rows), two steps in flight as in a run; the first ones do not count."""
        under_way: deque[Any] = deque()
        ends: list[float] = []
        host: list[float] = []
        began = time.perf_counter()
        for task, batch in batches:
            started = time.perf_counter()
            under_way.append(self._send(task, batch))
            host.append(time.perf_counter() - started)
            if len(under_way) == 2:
                metrics = jax.device_get(under_way.popleft())
                ends.append(time.perf_counter())
        while under_way:
            metrics = jax.device_get(under_way.popleft())
            ends.append(time.perf_counter())
        first = ends[untimed - 1] if untimed else began
        return Timed(ends[-1] - first, tuple(host[untimed:]), metrics)

    def _send(self, task: str, batch: HostBatch) -> Any:
        chosen, program = self.experiment.tasks[task], self._programs[task]
        now = {"visit": batch.step, **self.experiment.optimizers.progress(task, batch.step, {})}
        self._state, metrics = dispatch(program, chosen, self._mesh, self._state, batch, now)
        return metrics

    def order(self, start: int, stop: int) -> Sequence[str]:
        """Return the tasks of steps [start, stop)."""
        return self.session.clock.schedule.sequence(start, stop)

    @property
    def period(self) -> int:
        """The number of steps after which the schedule begins again."""
        segment = self.session.clock.schedule.segments[0]
        return sum(rule_of(segment.rule).counts([w for w in segment.weights.values() if w]))


def random_batch(experiment: Experiment, task: str, seed: int) -> HostBatch:
    """Return random numbers below 256 in the form of a task's batch; every row and token is valid."""
    rng, rows = np.random.default_rng(seed), experiment.tasks[task].batch

    def draw(spec: jax.ShapeDtypeStruct) -> Any:
        if spec.dtype == bool:
            return np.ones((rows, *spec.shape), bool)
        return rng.integers(0, 256, (rows, *spec.shape)).astype(spec.dtype)

    made = jax.tree.map(draw, experiment.tasks[task].rows().shapes())
    return HostBatch(step=0, start=0, rows=made, failed=())
