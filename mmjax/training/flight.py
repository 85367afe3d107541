"""Steps under way: given to the devices, and not yet known to be complete."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmjax.core.sharding import batch_sharding
from mmjax.engine.compile import Program
from mmjax.engine.loader import HostBatch, place
from mmjax.engine.state import State
from mmjax.engine.steps import ticks
from mmjax.schedule.shapes import ShapeVariant
from mmjax.task import Task

IN_FLIGHT = 2  # hundreds of steps in flight abort a run on many CPU devices


def dispatch(
    program: Program,
    task: Task,
    mesh: Mesh,
    state: State,
    host: HostBatch,
    clock: Mapping[str, float],
) -> tuple[State, Mapping[str, jax.Array]]:
    """Begin one step of a task: place its batch on the mesh, then call its program. `state` is consumed.

    `clock` holds the ticks of the program except the step: the visit, and what the learning rate depends on.
    """
    sharding = batch_sharding(mesh, task.batch, f"tasks.{task.name}")
    batch = place(host.rows, host.start, task.batch, sharding)
    with jax.profiler.StepTraceAnnotation(task.name, step_num=host.step):
        after, metrics = program.call(state, batch, ticks(mesh, step=host.step, **clock))
    return after, metrics


@dataclass
class _Dispatched:
    """A step whose metrics are still on the devices.

    Attributes:
      variant: the shape of the task that runs.
      waited: seconds that the loop waited for its batch.
      sent: when it was given to the devices.
    """

    step: int
    task: str
    variant: ShapeVariant
    metrics: Mapping[str, jax.Array]
    waited: float
    sent: float


@dataclass(frozen=True)
class Completed:
    """A complete step.

    Attributes:
      variant: the shape of the task that ran.
      metrics: the scalars of its program, but `finite`.
      is_finite: whether its loss and gradient were finite, so that it made an update.
      seconds: from the end of the step before to its own.
      waited: seconds that the loop waited for its batch.
      busy: seconds that the devices worked on it; None where its end was not seen.
    """

    step: int
    task: str
    variant: ShapeVariant
    metrics: Mapping[str, np.ndarray]
    is_finite: bool
    seconds: float
    waited: float
    busy: float | None

    @property
    def loss(self) -> float:
        return float(self.metrics["loss"])


class Flight:
    """The steps under way, oldest first; at most `IN_FLIGHT` of them are to be there at a time."""

    def __init__(self, programs: Mapping[str, Program], mesh: Mesh) -> None:
        self._programs, self._mesh = programs, mesh
        self._steps: deque[_Dispatched] = deque()
        self._completed = time.monotonic()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        return len(self) >= IN_FLIGHT

    @property
    def oldest(self) -> tuple[str, int]:
        """Task and step of the one that is completed next."""
        return self._steps[0].task, self._steps[0].step

    def send(
        self,
        state: State,
        host: HostBatch,
        variant: ShapeVariant,
        clock: Mapping[str, float],
        waited: float,
    ) -> State:
        """Give a step to the devices, and return the state after it, which is still being computed."""
        task, program = variant.task, self._programs[variant.program]
        state, metrics = dispatch(program, task, self._mesh, state, host, clock)
        sent = _Dispatched(host.step, task.name, variant, metrics, waited, time.monotonic())
        self._steps.append(sent)
        return state

    def complete(self) -> Completed:
        """Fetch the metrics of the oldest step, while the next one is under way."""
        oldest = self._steps.popleft()
        loss: Any = oldest.metrics["loss"]
        is_late = loss.is_ready()  # it ended at an unknown time before
        fetched = jax.device_get(oldest.metrics)
        metrics = {name: np.asarray(value) for name, value in fetched.items()}
        before, self._completed = self._completed, time.monotonic()
        return Completed(
            oldest.step,
            oldest.task,
            oldest.variant,
            metrics,
            bool(metrics.pop("finite")),
            seconds=self._completed - before,
            waited=oldest.waited,
            busy=None if is_late else self._completed - max(oldest.sent, before),
        )
