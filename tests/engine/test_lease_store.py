"""Stores of leases: a race has one winner, and a released lease leaves nothing."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bucket import bucket
from etils import epath
from leases import ID, lease_text, put

from mmjax.core.errors import UserError
from mmjax.core.workdir import LEASE
from mmjax.engine.lease_store import Entry, FileStore, ObjectStore, Store, store_of

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
        """Act before each file operation."""
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
    """Let the newest simulation decide before each file operation of `FileStore`."""
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
