"""A run in which something goes wrong for real.

    python tests/pod/faulty.py FAULT --extra=... --config=FILE --workdir=DIR [...]

takes the arguments of `mmjax train` after the name of the fault.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmjax import train
from mmjax.core import errors
from mmjax.objectives.base import Loss
from mmjax.sources.base import Cached
from mmjax.task import Task

READS = 30  # that go well


def _forever() -> None:
    threading.Event().wait()


def _after(reads: int, then: Callable[[], Any]) -> None:
    """Call `then` by the loader's thread in each read after so many."""
    counted, read = iter(range(10**9)), Cached.__getitem__

    def reading(self: Cached, index: int) -> Any:
        if next(counted) >= reads and threading.current_thread().name.startswith("grain"):
            then()
        return read(self, index)

    Cached.__getitem__ = reading  # type: ignore[method-assign]


def stuck_source() -> None:
    _after(READS, _forever)


def slow_source() -> None:
    """Make reads slow, so that a whole run takes longer than the limit."""
    _after(0, lambda: time.sleep(0.05))


def stuck_step() -> None:
    """Make the devices wait for a callback that does not return, in the fifth visit of a task."""
    loss, visits = Task.loss, iter(range(10**9))

    def wait(value: Any) -> Any:
        if next(visits) >= 4:
            _forever()
        return np.asarray(value)

    def waiting(self: Task, *arguments: Any) -> Loss:
        found = loss(self, *arguments)
        shape = jax.ShapeDtypeStruct(found.value.shape, found.value.dtype)
        seen = jax.pure_callback(wait, shape, jax.lax.stop_gradient(found.value))
        return Loss(found.value + 0 * seen, found.metrics)

    Task.loss = waiting  # type: ignore[method-assign]


def stuck_save() -> None:
    ocp.CheckpointManager.wait_until_finished = lambda self: _forever()  # type: ignore[method-assign]


def exiting_source() -> None:
    """Act as a library that ends the thread it runs in."""
    _after(READS, lambda: sys.exit(0))


def killed_threads() -> None:
    """Kill all threads of the loader from outside while they read."""

    def kill() -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("grain") and thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
                )
        time.sleep(0.01)

    _after(READS, kill)


def jumping_clock() -> None:
    """Make each look at the clock on the wall find another year."""
    jumps, wall = iter(range(10**9)), time.time
    time.time = lambda: wall() + (-1) ** next(jumps) * 3e7  # type: ignore[assignment]


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        stuck_source, slow_source, stuck_step, stuck_save, exiting_source, killed_threads, jumping_clock
    )
}  # fmt: skip


if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    errors.run(lambda: train.main(sys.argv[1:]))
