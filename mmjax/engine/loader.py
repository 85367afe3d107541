"""Batches along the known schedule: read and preprocessed ahead by Grain, placed on the mesh.

A batch is a pure function of (schedule, positions, step). Grain gives threads, processes and read-ahead below
that; its own state is never saved. A process reads only the rows that its devices hold.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection, parent_process, resource_tracker

import grain
import jax
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from jax.sharding import Mesh, NamedSharding

from mmjax.core import config as configs
from mmjax.core.batch import Batch
from mmjax.core.bounds import SIZE, check
from mmjax.core.errors import RecordError, UserError
from mmjax.core.sharding import batch_sharding
from mmjax.data import order
from mmjax.engine.state import Clock
from mmjax.objectives.base import Objective
from mmjax.schedule.phases import Phases
from mmjax.sources.base import Examples
from mmjax.task import Failure, RowSpec, Task, failure_of, refuse_mistake

Rows = tuple[slice, ...]
_ENDED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")  # Grain's words


@dataclass(frozen=True)
class LoaderConfig:
    """Host work.

    Attributes:
      threads: threads of the run's process that read and preprocess, where there are no `processes`.
      prefetch: batches made ahead of the step that runs.
      cache_mib: memory for examples as read, per source and process, in MiB.
      processes: processes that read and preprocess in place of threads, batches dealt out in turn; 0 for none.
        Useful if threads wait for the GIL more than for decoding: small pictures, many cores. Each process takes
        some seconds to start. The batches are the same.
    """

    threads: int = 2
    prefetch: int = 4
    cache_mib: int = 256
    processes: int = 0

    def __post_init__(self) -> None:
        check(self, threads=SIZE, prefetch=SIZE, cache_mib=SIZE, processes=SIZE)


@partial(
    jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["step", "start", "failed"]
)
@dataclass(frozen=True)
class HostBatch:
    """This process's rows of one batch, as NumPy arrays with a leading row axis.

    Attributes:
      step: the step it belongs to.
      start: index of its first row in the global batch; rows are contiguous.
      rows: the tree of `RowSpec`.
      failed: (position, error) of examples that could not be read; their rows are invalid.
    """

    step: int
    start: int
    rows: Batch
    failed: tuple[tuple[int, str], ...]


def process_rows(mesh: Mesh, where: str = "batch") -> Callable[[int], tuple[int, int]]:
    """Return `size -> (first, last)`: the rows of a batch of `size` that this process holds."""
    return lambda size: local_rows(batch_sharding(mesh, size, where), size)


def local_rows(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """Return the first and last + 1 row of a batch that this process's devices hold (the smallest range)."""
    slices = sharding.addressable_devices_indices_map((rows,)).values()
    ranges = [s[0].indices(rows) for s in slices if s is not None]
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def make_batch(
    spec: RowSpec,
    examples: Examples,
    ids: Sequence[int],
    rng: Callable[[int], np.random.Generator | None],
    size: int,
) -> tuple[Batch, tuple[tuple[int, str], ...]]:
    """Return rows for `ids`, blank ones up to `size`; and the rows that failed, by index."""
    rows, failed = _make_rows(spec, examples, ids, rng, size)
    return rows, tuple((index, failure.text) for index, failure in failed)


def _make_rows(
    spec: RowSpec,
    examples: Examples,
    ids: Sequence[int],
    rng: Callable[[int], np.random.Generator | None],
    size: int,
) -> tuple[Batch, list[tuple[int, Failure]]]:
    """Return the rows of `make_batch`, and the failures by index."""
    rows, failed = [], []
    for index, example_id in enumerate(ids):
        try:
            rows.append(spec.make(examples[int(example_id)], rng(index)))
        except Exception as error:
            # Whatever a corrupt or odd record makes a reader or decoder raise: the slot becomes invalid.
            if isinstance(error, UserError) and not isinstance(error, RecordError):
                raise
            failure = failure_of(error)
            text = f"{examples.description}[{int(example_id)}]: {failure.text}"
            failed.append((index, replace(failure, text=text)))
            rows.append(spec.blank())
    rows += [spec.blank()] * (size - len(rows))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows), failed


def arranged_rows(
    task: Task, examples: Examples, seed: int, position: int, share: tuple[int, int]
) -> tuple[Batch, tuple[tuple[int, str], ...]]:
    """Return rows [first, last) of the training batch that begins at `position`; and the failures, by position.

    The rows of a window of the objective lie in its order, which depends on all of them: where the share ends within
    a window, the whole window is read, so that every process comes to the same order.

    Raises:
      CodeError: no row of the task's first batch can be made, for one reason that is rarely the data's.
    """
    (first, last), window = share, task.objective.window_rows(task.batch)
    begin, end = first // window * window, -(-last // window) * window
    ids = order.example_ids(seed, task.name, position + begin, end - begin, len(examples))

    def rng(row: int) -> np.random.Generator:
        return order.rng(seed, task.name, position + begin + row)

    rows, failed = _make_rows(task.rows(), examples, list(ids), rng, end - begin)
    if position == 0 and len(failed) == end - begin > 1:
        refuse_mistake([failure for _, failure in failed], f"tasks.{task.name}")
    if window > 1:
        index = _arranged(task.objective, rows, window)[first - begin : last - begin]
        rows = jax.tree.map(lambda x: x[index], rows)
    return rows, tuple((position + begin + i, failure.text) for i, failure in failed)


def _arranged(objective: Objective, rows: Batch, window: int) -> np.ndarray:
    """Return which of the rows lies at each place."""
    count = len(rows.valid)
    windows = []
    for start in range(0, count, window):
        examples = [jax.tree.map(lambda x, i=start + i: x[i], rows) for i in range(window)]
        windows += [start + int(i) for i in objective.arranged(examples)]
    return np.array(windows, np.int64)


@contextmanager
def no_silent_end(work: str, task: str) -> Iterator[None]:
    """Turn the end of a thread that makes rows into an error.

    A library that calls `exit`, or a thread that is asked to end: passed on as it is, it would end the run in silence.

    Raises:
      UserError: what the thread made for which task, and what ended it.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        raise UserError(
            f"A thread of the loader died while it made {work} of task '{task}': {error!r}. "
            "Run again to resume; if it dies there again, look at the task's source."
        ) from error


class _Steps:
    """The batches from `clock` on, by index; what Grain reads."""

    def __init__(
        self,
        phases: Phases,
        data: Mapping[str, Examples],
        clock: Clock,
        stop: int,
        seed: int,
        share: Callable[[int], tuple[int, int]],
    ):
        self._settings, self._data, self._clock, self._stop, self._seed = (
            phases,
            data,
            clock,
            stop,
            seed,
        )
        # A table, since another process is not given the mesh that `share` asks.
        self._shares = {t.batch: share(t.batch) for t, _ in phases.programs.values()}

    def __len__(self) -> int:
        return max(self._stop - self._clock.step, 0)

    def __getitem__(self, index: int) -> HostBatch:
        step = self._clock.step + int(index)
        schedule = self._clock.schedule
        task = self._settings.variant(schedule.task(step), step, schedule.visit(step)).task
        with no_silent_end(f"step {step}", task.name):
            return self._batch(step, task)

    def _batch(self, step: int, task: Task) -> HostBatch:
        clock = self._clock
        passed = self._settings.consumed(clock.schedule, task.name, clock.step, step)
        position = clock.positions.get(task.name, 0) + passed
        first, last = self._shares[task.batch]
        rows, failed = arranged_rows(
            task, self._data[task.name], self._seed, position, (first, last)
        )
        return HostBatch(step, first, rows, failed)


class Loader:
    """Iterates over the `HostBatch`es of steps [clock.step, stop), made ahead in threads or processes."""

    def __init__(
        self,
        config: LoaderConfig,
        phases: Phases,
        data: Mapping[str, Examples],
        clock: Clock,
        stop: int,
        seed: int,
        share: Callable[[int], tuple[int, int]],
    ):
        steps = _Steps(phases, data, clock, stop, seed, share)
        if config.processes:
            batches = _by_processes(steps, config)
        else:
            options = grain.ReadOptions(config.threads, config.prefetch)
            batches = grain.MapDataset.source(steps).to_iter_dataset(options)
        self._batches = iter(batches)
        self._begins = bool(config.processes)
        self._shared: list[weakref.ref[SharedMemoryArray]] = []  # of other processes

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        try:
            batch = self._next()
        except RuntimeError as error:
            ended = _ENDED.search(str(error))
            if not ended:
                raise
            raise UserError(
                f"A process of the loader was ended from outside (exit code {ended[1]}; -9 is SIGKILL, often "
                "because memory ran out). Run again to resume from the newest checkpoint; if it happens again, lower "
                "loader.processes, loader.prefetch or loader.cache_mib."
            ) from None
        shared = [x for x in jax.tree.leaves(batch.rows) if isinstance(x, SharedMemoryArray)]
        alive = [reference for reference in self._shared if reference() is not None]
        self._shared = [*alive, *map(weakref.ref, shared)]
        return batch

    def _next(self) -> HostBatch:
        if not self._begins:
            return next(self._batches)
        self._begins = False
        # Block the signals while the workers start, so that they inherit the mask: only the main process handles
        # them; it saves, then stops the workers.
        resource_tracker.ensure_running()  # first: starting it lets the signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return next(self._batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Stop the threads and processes."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        for reference in self._shared:
            array = reference()
            if array is not None and array._unlink_on_del:
                # The array keeps the memory, and may outlive Grain's threads that would remove its name.
                array.shm.unlink()
                array._unlink_on_del = False
        self._shared = []


def _by_processes(steps: _Steps, config: LoaderConfig) -> grain.IterDataset[HostBatch]:
    if not flags.FLAGS.is_parsed():  # Grain reads its own flags, which are not set here
        flags.FLAGS.mark_as_parsed()
    # Grain keeps this number of batches in each process, and as many in this one.
    per_process = -(-config.prefetch // (2 * config.processes))
    options = grain.MultiprocessingOptions(config.processes, max(per_process, 1))
    # No threads in there: they would wait for each other.
    batches = grain.MapDataset.source(steps).to_iter_dataset(grain.ReadOptions(0, 0))
    return batches.mp_prefetch(options, partial(_begin_worker, configs.added_folders()))


def _begin_worker(folders: Sequence[str], index: int, count: int) -> None:
    """Set up a process of the loader: keep off the devices, and end with the run."""
    for folder in folders:
        configs.add_folder(folder)
    jax.config.update("jax_platforms", "cpu")
    run = parent_process()
    assert run is not None

    def follow() -> None:
        connection.wait([run.sentinel])
        os._exit(1)  # a killed run stops no worker

    threading.Thread(target=follow, daemon=True).start()


def place(rows: Batch, start: int, size: int, sharding: NamedSharding) -> Batch:
    """Return the global batch of `size` rows on the mesh, from this process's rows (which begin at `start`)."""

    def put(local: np.ndarray) -> jax.Array:
        def read(index: Rows | None) -> np.ndarray:
            first, last, _ = index[0].indices(size) if index else (0, size, 1)
            return local[first - start : last - start]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, read)

    # The one place where data may go to the devices unasked: JAX counts this call as implicit.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, rows)
