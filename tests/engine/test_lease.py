"""The lease on a workdir: one holder, a dead one's is taken, a live one's is not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tensorstore
import toyrun
from bucket import bucket
from etils import epath
from mains import refused

from mmjax import train
from mmjax.core.errors import UserError
from mmjax.core.workdir import LEASE
from mmjax.engine import checkpoint, lease_store
from mmjax.engine.lease import (
    Clock,
    Holder,
    Lease,
    LeaseLostError,
    Machine,
    Pace,
    fate_of,
    holder_of,
    start_of,
    this_machine,
)
from mmjax.engine.lease_store import Entry, FileStore, ObjectStore, Store, identity, store_of
from mmjax.monitor.line_file import LineFile
from mmjax.training import flight

BARE = "pid:[4026531836]"  # the first pid namespace of every Linux kernel
HOST = Machine("here", "m1", "boot1", BARE)
OTHER = Machine("there", "m2", "boot2", BARE)
ID = "0" * 31


def lease_text(number: int, **more: Any) -> bytes:
    """A lease with the id 00...`number`, of a process that has ended here unless `more` says other."""
    return replace(dead(), id=f"{ID}{number:x}", **more).text()


def dead() -> Holder:
    return Holder(ID + "0", "train", HOST, 2**22 + 1, "7", "2026-01-01 00:00:00 UTC", 3, 0.0)


@pytest.fixture(params=["files", "memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "files":
        return FileStore(tmp_path)
    spec = {"memory": {"driver": "memory"}, "file": {"driver": "file", "path": f"{tmp_path}/"}}
    return ObjectStore(tensorstore.KvStore.open(spec[request.param]).result())


@dataclass
class Time:
    """A clock that moves only when somebody sleeps; `during` is called with the time after each sleep."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)
    during: Callable[[float], None] = lambda now: None

    def clock(self) -> Clock:
        return Clock(lambda: self.now, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.during(self.now)


def lease(store: Store, time: Time | None = None, here: Machine = HOST, **more: Any) -> Lease:
    clock = (time or Time()).clock()
    return Lease(epath.Path("/runs/x"), "train", store, clock=clock, here=here, **more)


def put(store: Store, text: bytes) -> None:
    assert store.swap(store.read(), text)


# --- stores ------------------------------------------------------------------------------------


def test_a_store_changes_only_what_was_read(store: Store) -> None:
    empty = store.read()
    assert empty.text is None
    assert store.swap(empty, lease_text(1))
    first = store.read()
    assert first.text == lease_text(1) and first.id == ID + "1"
    assert not store.swap(empty, lease_text(2)), "it is no longer empty"
    assert store.swap(first, lease_text(1, beat=4)), "the holder renews it"
    assert store.swap(store.read(), lease_text(2))
    assert not store.swap(first, lease_text(3)), "it has another holder now"
    assert store.read().text == lease_text(2)
    assert store.swap(store.read(), None)
    assert store.read().text is None
    assert store.swap(store.read(), lease_text(4))


def test_a_released_lease_leaves_no_file(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for number in range(4):
        put(store, lease_text(number))
    kept = [f"{LEASE}.after-{ID}{number}" for number in range(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [LEASE, *kept]
    store.swap(store.read(), None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [1, 38, 95])  # EPERM, ENOSYS, EOPNOTSUPP
def test_a_file_system_without_links_has_leases_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    test_a_store_changes_only_what_was_read(FileStore(tmp_path))


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=str(tmp_path)):
        FileStore(tmp_path).swap(Entry(None), lease_text(1))


def test_the_store_of_a_workdir_is_that_of_its_file_system() -> None:
    assert isinstance(store_of(epath.Path("/runs/x")), FileStore)
    store = store_of(epath.Path("gs://bucket/run 7%20?#/x"))
    assert isinstance(store, ObjectStore)
    spec = store._kvstore.spec().to_json()
    assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "bucket", "run 7%20?#/x/")
    bucket()  # registers az://
    with pytest.raises(UserError, match=r"az://bucket/run: lease.json cannot be written there"):
        store_of(epath.Path("az://bucket/run"))


class Stopped(BaseException):
    """A process of the simulation is killed."""


@dataclass
class Simulation:
    """Processes that do one file operation at a time, in an order that `rng` draws, some of them killed.

    Attributes:
      deaths: operations after which each of these processes is killed.
    """

    rng: random.Random
    deaths: dict[str, int]
    _turn: dict[str, threading.Semaphore] = field(default_factory=dict)
    _back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _done: set[str] = field(default_factory=set)
    _count: dict[str, int] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    errors: list[Exception] = field(default_factory=list)

    def operation(self) -> None:
        """To be called before each file operation."""
        name = threading.current_thread().name
        if name not in self._turn:
            return
        self._back.release()
        self._turn[name].acquire()
        self._count[name] = self._count.get(name, 0) + 1
        if self._count[name] > self.deaths.get(name, 10**9) or name in self.dead:
            self.dead.add(name)
            raise Stopped

    def run(self, bodies: dict[str, Callable[[], None]]) -> None:
        def process(name: str, body: Callable[[], None]) -> None:
            try:
                self.operation()
                body()
            except Stopped:
                pass
            except Exception as error:
                self.errors.append(error)
            self._done.add(name)
            self._back.release()

        threads = []
        for name, body in bodies.items():
            self._turn[name] = threading.Semaphore(0)
            threads.append(threading.Thread(target=process, args=(name, body), name=name))
        for thread in threads:
            thread.start()
            self._back.acquire()
        while left := sorted(set(bodies) - self._done):
            self._turn[self.rng.choice(left)].release()
            self._back.acquire()
        for thread in threads:
            thread.join()
        assert not self.errors


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Simulation]]:
    """Lets the newest simulation decide before each file operation of `FileStore`."""
    current: list[Simulation] = []

    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def operation(*arguments: Any, **more: Any) -> Any:
            if current:
                current[-1].operation()
            return real(*arguments, **more)

        monkeypatch.setattr(owner, name, operation)

    for name in ("read_bytes", "write_bytes", "replace", "unlink"):
        before(Path, name)
    before(os, "link")
    yield current


RACERS = ("a", "b", "c")


@pytest.mark.parametrize("killed", [0, 1, 2, 3])
def test_of_processes_that_race_for_a_dead_lease_exactly_one_wins(
    killed: int, tmp_path: Path, stepwise: list[Simulation]
) -> None:
    """In 150 orders of their file operations.

    The former holder may be in the middle of a heartbeat, and another process takes the lease from the winner.
    """
    kills, successions = 0, 0
    for seed in range(150):
        rng = random.Random(1000 * killed + seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        put(FileStore(folder), lease_text(0))
        deaths = {name: rng.randint(1, 9) for name in rng.sample(RACERS, killed)}
        simulation, won = Simulation(rng, deaths), set()

        def race(name: str, folder: Path = folder, won: set[str] = won) -> None:
            store, number = FileStore(folder), 1 + RACERS.index(name)
            entry = store.read()
            if entry.id == ID + "0" and store.swap(entry, lease_text(number)):
                won.add(name)

        def renew(folder: Path = folder) -> None:
            store = FileStore(folder)
            entry = store.read()
            if entry.id == ID + "0":
                store.swap(entry, lease_text(0, beat=4))

        def succeed(folder: Path = folder, won: set[str] = won) -> None:
            store = FileStore(folder)
            for _ in range(30):
                entry = store.read()
                if entry.id != ID + "0":
                    won |= {"next"} if store.swap(entry, lease_text(8)) else set()
                    return

        stepwise.append(simulation)
        bodies: dict[str, Callable[[], None]] = {n: (lambda n=n: race(n)) for n in RACERS}
        simulation.run({**bodies, "holder": renew, "next": succeed})
        stepwise.clear()
        kills += len(simulation.dead)
        store = FileStore(folder)
        valid = store.read().id
        successions += "next" in won
        first = won - {"next"}
        assert len(first) <= 1, (seed, won)
        assert len(first) == 1 or killed or "next" in won, (seed, won)
        if "next" in won:
            assert valid == ID + "8", seed
        elif first:
            assert valid == f"{ID}{1 + RACERS.index(first.pop()):x}", seed
        # Whatever a kill left, the next process takes the lease over and gives it back.
        assert store.swap(store.read(), lease_text(9)) and store.read().id == ID + "9"
        assert store.swap(store.read(), None) and store.read().text is None
    assert kills >= 50 * killed and successions >= 20, (kills, successions)


def test_of_real_processes_that_race_for_dead_leases_each_is_won_once(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from mmjax.engine.lease_store import FileStore
number = sys.argv[2]
print("ready", flush=True); input()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    store = FileStore(folder)
    entry = store.read()
    if entry.id.endswith("0") and store.swap(entry, entry.text.replace(b'{ID}0', b'{ID}' + number.encode())):
        print(folder.name)
"""
    for index in range(200):
        (tmp_path / f"{index:03d}").mkdir()
        put(FileStore(tmp_path / f"{index:03d}"), lease_text(0))
    words = [sys.executable, "-c", code, str(tmp_path)]
    racers = [
        subprocess.Popen([*words, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in (1, 2, 3)
    ]
    for each in racers:
        assert each.stdout and each.stdout.readline() == "ready\n"
    for each in racers:
        assert each.stdin
        each.stdin.write("\n")
        each.stdin.flush()
    won = [each.communicate()[0].split() for each in racers]
    assert sorted(sum(won, [])) == [f"{index:03d}" for index in range(200)]
    for number, names in enumerate(won, 1):
        assert all(FileStore(tmp_path / n).read().id == f"{ID}{number}" for n in names)


# --- is the holder alive -----------------------------------------------------------------------


def mine(**more: Any) -> Holder:
    return replace(dead(), at=this_machine(), pid=os.getpid(), start=start_of(os.getpid()), **more)


def test_a_living_process_is_alive_and_one_of_another_start_is_dead() -> None:
    here = this_machine()
    assert here.boot and here.namespace.startswith("pid:[")
    assert fate_of(mine(), here) == "alive"
    assert fate_of(replace(mine(), start="1"), here) == "dead"


def test_a_process_that_is_gone_or_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = replace(mine(), pid=child.pid, start=start_of(child.pid))
    assert fate_of(holder, this_machine()) == "alive"
    child.kill()
    os.waitid(
        os.P_PID, child.pid, os.WEXITED | os.WNOWAIT
    )  # it has ended, and nobody has asked for its status
    assert fate_of(holder, this_machine()) == "dead"
    child.wait()
    assert fate_of(holder, this_machine()) == "dead"


CONTAINER = "pid:[4026532456]"


@pytest.mark.parametrize(
    ("change", "here", "fate"),
    [
        ({}, {"boot": "boot2"}, "dead"),  # the machine has booted since
        ({}, {"boot": "boot2", "machine": "m2"}, "unknown"),  # another machine of that name
        ({}, {"boot": "boot2", "host": "other"}, "unknown"),  # another machine of that image
        ({"machine": ""}, {"boot": "boot2", "machine": ""}, "unknown"),
        ({"namespace": CONTAINER}, {"boot": "boot2", "namespace": CONTAINER}, "unknown"),
        ({"namespace": CONTAINER}, {"boot": "boot2"}, "unknown"),
        (
            {"namespace": CONTAINER},
            {},
            "unknown",
        ),  # a container on this machine, with numbers of its own
        ({}, {"namespace": CONTAINER}, "unknown"),
        ({"namespace": CONTAINER}, {"namespace": CONTAINER}, "dead"),  # in the same container
        ({"boot": ""}, {"boot": ""}, "unknown"),
        ({"namespace": ""}, {"namespace": ""}, "unknown"),
    ],
)
def test_process_numbers_count_only_where_they_mean_something(
    change: dict[str, str], here: dict[str, str], fate: str
) -> None:
    """The process of the lease is gone, where its number is one of this machine's."""
    holder = replace(dead(), at=replace(HOST, **change))
    assert fate_of(holder, replace(HOST, **here)) == fate


@pytest.mark.parametrize("pid", [0, -1, 2**70])
def test_a_number_that_is_no_process_asks_no_process(pid: int) -> None:
    assert fate_of(replace(mine(), pid=pid), this_machine()) in ("unknown", "dead")


# --- taking ------------------------------------------------------------------------------------


def test_a_free_lease_is_taken_and_names_its_holder(store: Store) -> None:
    lease(store).take()
    text = store.read().text
    assert text is not None
    holder = holder_of(text)
    assert holder and (holder.command, holder.at, holder.pid) == ("train", HOST, os.getpid())
    assert json.loads(text)["at"] == {
        "host": "here", "machine": "m1", "boot": "boot1", "namespace": BARE,
    }  # fmt: skip


def test_a_dead_holder_is_replaced_at_once(store: Store) -> None:
    put(store, lease_text(1))
    time, said = Time(), list[str]()
    lease(store, time, say=said.append).take()
    assert (time.slept, said) == ([], []) and store.read().id != ID + "1"


def test_a_live_holder_is_named_and_nothing_changes(store: Store) -> None:
    here = this_machine()
    first = lease(store, here=here)
    first.take()
    before = store.read().text
    for take_over in (False, True):
        with pytest.raises(
            UserError, match=rf"train, process {os.getpid()} on {here.host} since 20"
        ):
            lease(store, here=here, take_over=take_over).take()
    assert store.read().text == before
    first.check()


@pytest.mark.parametrize(
    "text", [lease_text(1, at=OTHER), b"", b"{", b'{"id": 7}', b"\xff\x00", b"[]"]
)
def test_a_heartbeat_elsewhere_that_stands_still_for_a_minute_is_dead(
    text: bytes, store: Store
) -> None:
    put(store, text)
    time, said = Time(), list[str]()
    lease(store, time, say=said.append).take()
    assert sum(time.slept) == 60 and holder_of(store.read().text or b"").pid == os.getpid()  # type: ignore[union-attr]
    [line] = said
    assert line.startswith("Waiting up to 60 s for a sign of life in '/runs/x' from ")
    assert "--take_over" in line and ("there" in line) == (text != b"" and b"there" in text)


def test_a_heartbeat_that_moves_is_a_live_holder(store: Store) -> None:
    put(store, lease_text(1, at=OTHER))

    def beat(now: float) -> None:
        if now == 1030:
            put(store, lease_text(1, at=OTHER, beat=4))

    time = Time(during=beat)
    with pytest.raises(UserError, match="process 4194305 on there since 2026-01-01"):
        lease(store, time, say=lambda _: None).take()
    assert sum(time.slept) == 30 and store.read().text == lease_text(1, at=OTHER, beat=4)


def test_another_who_takes_it_first_is_watched_from_then_on(store: Store) -> None:
    put(store, lease_text(1, at=OTHER))

    def took(now: float) -> None:
        if now == 1059:
            put(store, lease_text(2, at=OTHER))

    time, said = Time(during=took), list[str]()
    lease(store, time, say=said.append).take()
    assert sum(time.slept) == 119 and len(said) == 2


def test_take_over_skips_the_wait(store: Store) -> None:
    put(store, lease_text(1, at=OTHER))
    time, said = Time(), list[str]()
    lease(store, time, say=said.append, take_over=True).take()
    assert time.slept == [] and said[0].startswith("Taking '/runs/x' over from train, process")


@pytest.mark.parametrize(("beaten", "waits"), [(1000.0, 60), (960.0, 20), (900.0, 0), (5000.0, 60)])
def test_one_boot_has_one_clock_that_shortens_the_wait(
    beaten: float, waits: float, store: Store
) -> None:
    """Containers on one machine; a clock that is ahead shortens nothing."""
    text = lease_text(1, at=replace(HOST, namespace=CONTAINER), monotonic=beaten)
    put(store, text)
    time = Time(now=1000.0)
    lease(store, time, say=lambda _: None).take()
    assert sum(time.slept) == waits


# --- holding -----------------------------------------------------------------------------------


def test_the_heartbeat_moves_and_the_id_stays(store: Store) -> None:
    held, time = lease(store), Time()
    held.take()
    before = store.read()
    held.beat()
    after = store.read()
    assert after.id == before.id and after.text != before.text
    held.check()
    held.release()
    assert store.read().text is None and time.slept == []


def test_a_thread_beats_until_the_lease_is_given_back(store: Store) -> None:
    held = lease(store, pace=Pace(beat=0.001))
    held.take()
    with held:
        limit = time.monotonic() + 60
        while holder_of(store.read().text or b"").beat < 5:  # type: ignore[union-attr]
            assert time.monotonic() < limit
    assert store.read().text is None
    assert "mmjax-lease" not in [t.name for t in threading.enumerate()]


def test_a_disk_that_is_full_for_a_while_costs_no_lease(store: Store) -> None:
    held = lease(store, pace=Pace(beat=0.001))
    held.take()
    real, failed = store.swap, threading.Event()

    def full(*_: Any) -> bool:
        failed.set()
        raise OSError(28, "No space left on device")

    store.swap = full  # type: ignore[method-assign]
    with held:
        assert failed.wait(60)
        held.check()
        store.swap = real  # type: ignore[method-assign]
        before = store.read().text
        limit = time.monotonic() + 60
        while store.read().text == before:
            assert time.monotonic() < limit


@pytest.mark.parametrize("taken", [True, False])
def test_a_lease_that_was_lost_is_told_and_stays_the_others(taken: bool, store: Store) -> None:
    held = lease(store)
    held.take()
    put(store, lease_text(2, at=OTHER)) if taken else store.swap(store.read(), None)
    held.beat()
    with pytest.raises(LeaseLostError, match="on there since" if taken else "lease.json is gone"):
        held.check()
    held.release()
    assert store.read().text == (lease_text(2, at=OTHER) if taken else None)


def test_lines_stop_when_the_lease_is_lost(tmp_path: Path) -> None:
    lost = False

    def guard() -> None:
        if lost:
            raise LeaseLostError("lost")

    path = epath.Path(tmp_path) / "lines"
    lines = LineFile(path, guard)
    lines.append("one\n")
    lines.sync()
    lost = True
    lines.append("two\n")
    with pytest.raises(LeaseLostError):
        lines.sync()


# --- a run -------------------------------------------------------------------------------------


def contents(workdir: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in workdir.rglob("*") if p.is_file())
    return {str(p.relative_to(workdir)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


WORDS = (f"--extra={toyrun.EXTRA}", f"--config={toyrun.CONFIG}", "--config.mesh.data=8")


def test_a_second_run_in_a_live_workdir_changes_nothing(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    toyrun.run(workdir, "steps=4")
    put(FileStore(workdir), mine().text())
    before, folder = contents(workdir), workdir.stat().st_mtime_ns
    said = refused(train.main, *WORDS, f"--workdir={workdir}")
    assert f"train, process {os.getpid()} on {this_machine().host}" in said and "in use" in said
    assert contents(workdir) == before and workdir.stat().st_mtime_ns == folder


def test_a_run_holds_a_lease_while_it_writes_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(FileStore(tmp_path), replace(dead(), at=this_machine()).text())  # of one that was killed
    seen, save = list[str](), checkpoint.Checkpoints.save

    def noted(*arguments: Any, **more: Any) -> None:
        seen.append(FileStore(tmp_path).read().id)
        save(*arguments, **more)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    toyrun.run(tmp_path)
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0] != dead().id
    assert not list(tmp_path.glob("lease*"))


@pytest.mark.parametrize("step", [5, 11])
def test_a_run_that_loses_its_lease_saves_nothing_more(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, calls = flight.place, [0]

    def placed(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            put(FileStore(tmp_path), lease_text(2, at=OTHER))
        return place(*arguments)

    monkeypatch.setattr(flight, "place", placed)
    with pytest.raises(LeaseLostError, match="process 4194305 on there since"):
        toyrun.run(tmp_path, "log.every=1")
    assert checkpoint.steps(epath.Path(tmp_path))[0] == step // 4 * 4
    assert FileStore(tmp_path).read().text == lease_text(2, at=OTHER)
    assert not (tmp_path / "results.json").exists()
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) < step


def test_the_id_of_hostile_text_is_no_path() -> None:
    for text in (b'{"id": "../../x"}', b'{"id": 7}', b"[]", b"", b'{"id": "' + b"0" * 33 + b'"}'):
        assert len(identity(text)) == 32 and identity(text).isalnum()
    assert lease_store.identity(lease_text(1)) == ID + "1"
