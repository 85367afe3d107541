"""Batches: a pure function of schedule, positions and step; rows where they belong; corrupt records."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import toyrun
from harness import Harness, deterministic, log
from jax.sharding import NamedSharding
from toyrun import block, run, watched

from mmjax import train
from mmjax.core.errors import CodeError, UserError
from mmjax.core.sharding import MeshConfig, batch_sharding, make_mesh
from mmjax.data import order
from mmjax.engine.loader import (
    HostBatch,
    Loader,
    LoaderConfig,
    arranged_rows,
    local_rows,
    make_batch,
    place,
)
from mmjax.engine.state import Clock
from mmjax.experiment import make_experiment
from mmjax.schedule.phases import Phases
from mmjax.schedule.schedule import Schedule
from mmjax.sources.base import Examples

STEPS = 14
# The line of the toy source that raises for a corrupt record.
_SOURCE = toyrun.EXTRA / "sources" / "toy.py"
_NUMBERS = [i for i, line in enumerate(_SOURCE.read_text().splitlines(), 1) if "is garbage" in line]
LINE = f"{os.path.relpath(_SOURCE)}:{_NUMBERS[0]}"
WHOLE: Callable[[int], tuple[int, int]] = lambda size: (0, size)  # noqa: E731


@dataclass(frozen=True)
class World:
    """The tasks of a config, their data, and the clock at step 0."""

    tasks: Mapping[str, Any]
    phases: Phases
    data: Mapping[str, Examples]
    schedule: Schedule

    def clock(self, step: int, positions: Mapping[str, int] | None = None) -> Clock:
        visits = self.schedule.visits(step)
        counted = {t: visits[t] * self.tasks[t].batch for t in self.tasks}
        return Clock(step, self.schedule, positions or counted, {}, {})

    def batches(
        self,
        clock: Clock,
        stop: int = STEPS,
        share: Callable[[int], tuple[int, int]] = WHOLE,
        config: LoaderConfig = LoaderConfig(),  # noqa: B008
    ) -> list[HostBatch]:
        loader = Loader(config, self.phases, self.data, clock, stop, toyrun.SEED, share)
        try:
            return list(loader)
        finally:
            loader.close()


def world(*overrides: str) -> World:
    experiment = make_experiment(block(*overrides))
    data = {name: task.source.open() for name, task in experiment.tasks.items()}
    return World(experiment.tasks, experiment.phases, data, experiment.planned.schedule())


@pytest.fixture(scope="module")
def toy() -> World:
    return world()


@pytest.fixture(scope="module")
def whole(toy: World) -> list[HostBatch]:
    return toy.batches(toy.clock(0))


def equal(one: Any, two: Any) -> bool:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, two)
    return all(jax.tree.leaves(same))


def ids(batch: HostBatch) -> list[int]:
    return [int(i) for i in batch.rows.fields["id"]]


# --- a pure function ---------------------------------------------------------------------------


def test_each_task_reads_its_order_from_its_position(toy: World, whole: list[HostBatch]) -> None:
    read: dict[str, list[int]] = {task: [] for task in toy.tasks}
    for step, batch in enumerate(whole):
        task = toy.schedule.task(step)
        assert batch.step == step and batch.start == 0 and not batch.failed
        assert len(ids(batch)) == toy.tasks[task].batch
        read[task] += ids(batch)
    for task, found in read.items():
        expected = order.example_ids(toyrun.SEED, task, 0, len(found), len(toy.data[task]))
        assert found == expected.tolist()
        # More than an epoch, and every epoch holds each example once.
        assert len(found) > 40 and sorted(found[:40]) == list(range(40))


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_restart_anywhere_gives_the_same_batches(
    toy: World, whole: list[HostBatch], start: int
) -> None:
    again = toy.batches(toy.clock(start))
    assert len(again) == STEPS - start
    for batch, expected in zip(again, whole[start:], strict=True):
        assert batch.step == expected.step and equal(batch.rows, expected.rows)


def test_the_position_decides_not_the_visits(toy: World, whole: list[HostBatch]) -> None:
    """After a change of the batch size, visits times the batch would be another place."""
    moved = toy.batches(toy.clock(3, {"one": 5, "two": 1000}))
    for task, position in (("one", 5), ("two", 1000)):
        found = [i for b in moved if toy.schedule.task(b.step) == task for i in ids(b)]
        expected = order.example_ids(toyrun.SEED, task, position, len(found), 40)
        assert found == expected.tolist()
    assert ids(moved[0]) != ids(whole[3])


@pytest.mark.parametrize(
    "config", [LoaderConfig(threads=1, prefetch=1), LoaderConfig(8, 16)], ids=str
)
def test_threads_and_reading_ahead_change_nothing(
    toy: World, whole: list[HostBatch], config: LoaderConfig
) -> None:
    for batch, expected in zip(toy.batches(toy.clock(0), config=config), whole, strict=True):
        assert batch.step == expected.step and equal(batch.rows, expected.rows)


@pytest.mark.parametrize("count", [1, 3])
def test_processes_change_nothing(toy: World, whole: list[HostBatch], count: int) -> None:
    """From the middle of a run on."""
    config = LoaderConfig(processes=count)
    for batch, expected in zip(toy.batches(toy.clock(3), config=config), whole[3:], strict=True):
        assert batch.step == expected.step and equal(batch.rows, expected.rows)


def test_a_closed_loader_leaves_no_name_of_shared_memory(toy: World) -> None:
    """As in a run that an error ends, whose last batch is never deleted."""
    loader = Loader(LoaderConfig(processes=1), toy.phases, toy.data, toy.clock(0), 9, 0, WHOLE)
    batch = next(loader)
    arrays = [x for x in jax.tree.leaves(batch.rows) if getattr(x, "shm", None) is not None]
    names = [Path("/dev/shm") / x.shm.name for x in arrays]
    copies = [np.array(x) for x in arrays]
    assert names and all(name.exists() for name in names)
    loader.close()
    assert not any(name.exists() for name in names)
    assert all((x == copy).all() for x, copy in zip(arrays, copies, strict=True))


def test_an_error_in_a_process_is_told(toy: World) -> None:
    wrong = {**toy.data, "one": []}
    loader = Loader(LoaderConfig(processes=2), toy.phases, wrong, toy.clock(0), 9, 0, WHOLE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Task 'one' has no examples"):
        list(loader)
    loader.close()


def test_a_process_that_was_killed_is_told_in_one_line(toy: World) -> None:
    """As by the system, for want of memory."""
    config = LoaderConfig(processes=1, prefetch=1)
    loader = Loader(config, toy.phases, toy.data, toy.clock(0), 10**6, 0, WHOLE)
    before = set(active_children())
    next(loader)
    [worker] = set(active_children()) - before
    worker.kill()
    with pytest.raises(UserError, match=r"exit code -9.*loader.processes"):
        for _ in loader:
            pass
    loader.close()


ENDLESS = [
    f"--config.{word}"
    for word in ("loader.processes=3", "steps=100000", "checkpoint.every=0", "evaluation.every=0")
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_run(
    tmp_path: Path, toy_command: Callable[..., Harness], number: signal.Signals
) -> None:
    """A signal for the whole group, as a terminal or a cluster sends it, is for the run: it saves."""
    harness = toy_command(tmp_path / "run", *ENDLESS)
    run = subprocess.Popen(harness.command, env=dict(harness.environment), start_new_session=True)
    try:
        lines = tmp_path / "run" / "metrics.jsonl"
        _await(lambda: lines.exists() and '"train"' in lines.read_text())
        # At some moments the run has mapped none of the memory in which batches come.
        shared: list[Path] = []
        _await(lambda: bool(shared.extend(_shared(run.pid)) or any(p.exists() for p in shared)))
        workers = _children(run.pid)
        assert len(workers) >= 3
        if number == signal.SIGTERM:
            os.killpg(run.pid, number)
        else:
            run.kill()
        assert run.wait(120) == (train.STOPPED if number == signal.SIGTERM else -number)
        _await(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        # Python's tracker of shared memory gives back what the dead left.
        _await(lambda: not any(p.exists() for p in shared))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Return children of all threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(p) for thread in threads for p in (thread / "children").read_text().split()]


def _shared(pid: int) -> list[Path]:
    """Return the shared memory that a process sees."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [Path(line.split()[5]) for line in lines if "/dev/shm/" in line]


def _await(there: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not there():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_augmentation_belongs_to_the_position_not_to_the_batch(whole: list[HostBatch]) -> None:
    other = world("tasks.one.batch=4")
    halves = other.batches(other.clock(0))
    of_one = [b for b in whole if len(ids(b)) == 8]
    rows = np.concatenate([b.rows.inputs["toy"]["rows"] for b in of_one])
    small = [b for b in halves if other.schedule.task(b.step) == "one"]
    again = np.concatenate([b.rows.inputs["toy"]["rows"] for b in small])
    assert np.array_equal(again, rows[: len(again)]) and len(again) > 30
    # An example is drawn again in its next epoch.
    first = {i: r for i, r in zip(sum(map(ids, of_one), [])[:40], rows[:40], strict=True)}
    last = {i: r for i, r in zip(sum(map(ids, of_one), [])[40:], rows[40:], strict=True)}
    assert last and all(0 < np.abs(first[i] - last[i]).max() < 0.1 for i in last)


def test_rows_are_what_the_task_says(toy: World, whole: list[HostBatch]) -> None:
    for batch in whole[:3]:
        task = toy.tasks[toy.schedule.task(batch.step)]
        expected = jax.tree.map(
            lambda s, n=task.batch: ((n, *s.shape), s.dtype), task.rows().shapes()
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch.rows) == expected
        assert batch.rows.valid.all()


def test_closing_stops_the_threads(toy: World) -> None:
    before = set(threading.enumerate())
    loader = Loader(
        LoaderConfig(threads=4, prefetch=2), toy.phases, toy.data, toy.clock(0), 10**6, 0, WHOLE
    )
    next(loader)
    started = set(threading.enumerate()) - before
    assert started
    loader.close()
    limit = time.monotonic() + 60
    while any(t.is_alive() for t in started) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not [t for t in started if t.is_alive()]


# --- rows and devices --------------------------------------------------------------------------

MESHES = [{"data": 8}, {"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}]


@dataclass(frozen=True)
class Group:
    """A sharding as one process of several sees it: only `devices` are its own."""

    sharding: NamedSharding
    devices: Sequence[jax.Device]

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> Mapping[Any, Any]:
        every = self.sharding.devices_indices_map(shape)
        return {device: every[device] for device in self.devices}


def groups(sizes: Mapping[str, int], count: int, rows: int) -> list[Group]:
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    devices = list(mesh.devices.flat)
    each = len(devices) // count
    sharding = batch_sharding(mesh, rows, "test")
    return [Group(sharding, devices[i * each : (i + 1) * each]) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_rows_of_all_processes_tile_the_batch(sizes: dict[str, int], count: int) -> None:
    rows = 16
    held = []
    for group in groups(sizes, count, rows):
        first, last = local_rows(group, rows)  # type: ignore[arg-type]
        shards = group.addressable_devices_indices_map((rows,)).values()
        own = {r for (s,) in shards for r in range(*s.indices(rows))}
        assert own == set(range(first, last))  # what its devices hold, and no more
        held.append((first, last))
    assert held[0][0] == 0 and held[-1][1] == rows
    distinct = sorted(set(held))
    assert all(a[1] == b[0] for a, b in zip(distinct, distinct[1:], strict=False))
    # Devices that share rows are no reason to read them all.
    parts = np.prod([n for axis, n in sizes.items() if axis != "tensor"])
    assert len(distinct) == min(parts, count)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_together_read_the_global_batch(
    toy: World, whole: list[HostBatch], count: int
) -> None:
    """Also positions of what failed are those of the global batch."""
    found = []
    for index in range(count):

        def share(size: int, index: int = index) -> tuple[int, int]:
            group = groups({"data": 4, "fsdp": 2}, count, size)[index]
            return local_rows(group, size)  # type: ignore[arg-type]

        found.append(toy.batches(toy.clock(0), share=share))
    for step, expected in enumerate(whole):
        parts = [batches[step] for batches in found]
        assert [p.start for p in parts] == [i * len(ids(expected)) // count for i in range(count)]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(p.rows for p in parts))
        assert equal(joined, expected.rows)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_are_placed_where_they_belong(whole: list[HostBatch], sizes: dict[str, int]) -> None:
    batch = next(b for b in whole if len(ids(b)) == 16)
    sharding = batch_sharding(make_mesh(MeshConfig(**{"data": 1, **sizes})), 16, "test")
    placed = place(batch.rows, 0, 16, sharding)
    assert equal(jax.tree.map(np.asarray, placed), batch.rows)
    for array in jax.tree.leaves(placed):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    parts = 16 // np.prod([n for axis, n in sizes.items() if axis != "tensor"])
    for shard in placed.fields["id"].addressable_shards:
        assert shard.data.shape == (parts,)
        assert np.array_equal(shard.data, batch.rows.fields["id"][shard.index])


def test_a_process_places_its_rows_by_their_place_in_the_global_batch() -> None:
    """What `place` would give to each device of the second of two processes."""
    local = np.arange(8, 16) * 10
    sharding = batch_sharding(make_mesh(MeshConfig()), 16, "test")
    with mock.patch.object(jax, "make_array_from_callback") as made:
        place({"x": local}, 8, 16, sharding)
    (shape, used, read), _ = made.call_args
    assert shape == (16,) and used is sharding
    assert read((slice(10, 12),)).tolist() == [100, 110]
    assert read((slice(8, None),)).tolist() == local.tolist()


# --- what cannot be read -----------------------------------------------------------------------


def test_a_corrupt_record_is_an_invalid_slot_and_never_the_next_one(whole: list[HostBatch]) -> None:
    torn = world("tasks.one.source.corrupt=(3,17)")
    position = 0
    met = 0
    for batch, expected in zip(torn.batches(torn.clock(0)), whole, strict=True):
        if torn.schedule.task(batch.step) != "one":
            assert equal(batch.rows, expected.rows) and not batch.failed
            continue
        bad = [row for row, i in enumerate(ids(expected)) if i in (3, 17)]
        for row, i in enumerate(ids(expected)):
            one, other = (jax.tree.map(lambda x, r=row: x[r], b.rows) for b in (batch, expected))
            assert bool(one.valid) == (row not in bad)
            blank = jax.tree.map(np.zeros_like, other)
            assert equal(one, blank if row in bad else other), i
        names = [
            f"toy 40[{i}]: ValueError: record {i} is garbage ({LINE})"
            for i in (ids(expected)[row] for row in bad)
        ]
        assert batch.failed == tuple(zip([position + row for row in bad], names, strict=True))
        position += 8
        met += len(bad)
    assert met >= 3


def test_a_mistake_in_the_code_ends_the_run_at_the_first_batch_of_a_task(toy: World) -> None:
    """As in code that only training runs, which the check at the start does not."""

    class Broken(type(toy.data["one"])):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            return {}["vlaues"]

    task = toy.tasks["one"]
    broken = Broken(task.source)
    words = r"tasks\.one: none of 8 examples .*toy 40\[\d+\]: KeyError: 'vlaues' \(.*test_loader\.py:\d+\)"
    with pytest.raises(CodeError, match=words):
        arranged_rows(task, broken, 0, 0, (0, 8))
    rows, failed = arranged_rows(task, broken, 0, 8, (0, 8))
    assert [position for position, _ in failed] == list(range(8, 16)) and not rows.valid.any()


def test_a_mistake_of_the_persons_is_no_corrupt_record(toy: World) -> None:
    spec = toy.tasks["one"].rows()

    class Wrong(type(toy.data["one"])):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            raise UserError("the data is not built")

    wrong = Wrong(toy.tasks["one"].source)
    with pytest.raises(UserError, match="not built"):
        make_batch(spec, wrong, [1], lambda _: None, 4)
    loader = Loader(
        LoaderConfig(), toy.phases, {**toy.data, "one": wrong}, toy.clock(0), 5, 0, WHOLE
    )
    with pytest.raises(UserError, match="not built"):
        list(loader)
    loader.close()


def test_rows_past_the_last_example_are_blank(toy: World) -> None:
    spec = toy.tasks["one"].rows()
    rows, failed = make_batch(spec, toy.data["one"], [4, 2], lambda _: None, 5)
    assert not failed and rows.valid.tolist() == [True, True, False, False, False]
    assert rows.fields["id"].tolist() == [4, 2, 0, 0, 0]
    assert not rows.inputs["toy"]["rows"][2:].any() and rows.inputs["toy"]["rows"][:2].any()


def test_a_run_counts_and_names_what_it_could_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with watched() as seen:
        run(tmp_path / "run", "tasks.one.source.corrupt=(3,17)")
    taken = order.example_ids(toyrun.SEED, "one", 0, 64, 40).tolist()
    bad = sorted((taken.index(i), i) for i in (3, 17))
    clock = toyrun.meta(tmp_path / "run")["clock"]
    assert clock["invalid"] == {"one": 2, "two": 0} and clock["invalid_ids"] == {"one": [3, 17]}
    assert clock["positions"]["one"] == 64  # a slot is consumed, whatever it held
    words = [
        f"task one, position {p}: toy 40[{i}]: ValueError: record {i} is garbage ({LINE})"
        for p, i in bad
    ]
    lines = log(tmp_path / "run")
    assert [x["text"] for x in lines if x["line"] == "event"] == words
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"invalid example: {w}" in printed for w in words)
    assert len(seen.ids) == 12
    losses = [x["loss"] for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    assert np.isfinite(losses).all()


def test_the_count_goes_on_after_a_restart(tmp_path: Path) -> None:
    corrupt = "tasks.one.source.corrupt=(3,17)"
    run(tmp_path / "whole", corrupt)
    run(tmp_path / "halved", corrupt, "steps=8")
    run(tmp_path / "halved", corrupt)
    assert toyrun.bits(tmp_path / "whole") == toyrun.bits(tmp_path / "halved")


def test_too_many_corrupt_records_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(
            tmp_path / "run",
            f"tasks.two.source.corrupt={tuple(range(30))}",
            "limits.max_invalid_examples=20",
        )
    said = str(error.value)
    assert (
        "Task 'two'" in said and "limits.max_invalid_examples = 20" in said and "is garbage" in said
    )
    run(tmp_path / "fewer", "tasks.two.source.corrupt=(1,)", "limits.max_invalid_examples=2")


def test_a_batch_of_nothing_but_invalid_rows_has_no_loss(tmp_path: Path) -> None:
    """Zero, not NaN."""
    every = tuple(range(40))
    run(
        tmp_path / "run",
        f"tasks.two.source.corrupt={every}",
        "limits.max_invalid_examples=1000",
        "steps=6",
    )
    lines = [x for x in deterministic(tmp_path / "run") if x["kind"] == "train"]
    assert {x["loss"] for x in lines if x["task"] == "two"} == {0.0}
    assert all(x["loss"] > 0 for x in lines if x["task"] == "one")
