"""A lease on a workdir: one process at a time writes a run's files there.

`WORKDIR/lease.json` names the holder: a random id, its host, boot, process and start, and a heartbeat that it renews.
Another process that wants the lease

- ends with an error that names the holder, if the holder lives;
- takes the lease at once, if the holder is provably dead: on the same boot of the same machine its process is gone or
  the process of that number has started at another time; or the machine has booted since;
- else watches the heartbeat, and takes the lease when that has not changed for a minute.

Process numbers mean something only to processes of one pid namespace. In a container, or on another host, the heartbeat
decides. Times of different machines are never compared: what counts is how long the heartbeat stood still while this
process was watching (or, on one boot, the machine's own monotonic clock).
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from etils import epath

from mmjax.core.errors import UserError
from mmjax.core.workdir import LEASE
from mmjax.engine import processes
from mmjax.engine.lease_store import Entry, Store, store_of

# The pid namespace of the machine itself (PROC_PID_INIT_INO of include/linux/proc_ns.h).
_INITIAL_NAMESPACE = "pid:[4026531836]"
Fate = Literal["alive", "dead", "unknown"]


class LeaseLostError(UserError):
    """Another process holds the lease that this one had, or none does."""


@dataclass(frozen=True)
class Pace:
    """Times in seconds.

    Attributes:
      beat: between two heartbeats.
      stale: a heartbeat that has not changed for so long is that of a dead holder.
      look: between two looks at a heartbeat.
    """

    beat: float = 10.0
    stale: float = 60.0
    look: float = 1.0


@dataclass(frozen=True)
class Clock:
    """The time, for tests to replace.

    Attributes:
      now: seconds of the machine's monotonic clock, the same for all its processes.
      sleep: waits for a number of seconds.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


# --- who ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The machine or container that a process runs on.

    Attributes:
      host: its name, which two machines or containers may share.
      machine: the installation's id, which images may share.
      boot: a random id of this boot; empty if unknown.
      namespace: the pid namespace; empty if unknown.
    """

    host: str
    machine: str
    boot: str
    namespace: str

    @property
    def is_bare(self) -> bool:
        """True for the machine itself, False for a container on it."""
        return self.namespace in (_INITIAL_NAMESPACE, "darwin")


@dataclass(frozen=True)
class Holder:
    """The holder of a lease.

    Attributes:
      id: random; the identity of the lease.
      command: what it does, such as `train`.
      pid: its process.
      start: when that process started, in the system's own form; empty if unknown.
      since: when it took the lease, in UTC.
      beat: the number of its heartbeats.
      monotonic: its machine's monotonic clock at the last heartbeat.
    """

    id: str
    command: str
    at: Machine
    pid: int
    start: str
    since: str
    beat: int
    monotonic: float

    def text(self) -> bytes:
        """Return the lease as it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on {self.at.host} since {self.since}"


def holder_of(text: bytes) -> Holder | None:
    """Return the holder that a stored lease names; None if the text is no lease."""
    try:
        data = json.loads(text)
        at = Machine(**{f.name: str(data["at"][f.name]) for f in dataclasses.fields(Machine)})
        return Holder(
            str(data["id"]), str(data["command"]), at, int(data["pid"]), str(data["start"]),
            str(data["since"]), int(data["beat"]), float(data["monotonic"]),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError):
        return None


def this_machine() -> Machine:
    """Return where this process runs."""
    machine = _first_line("/etc/machine-id")
    if sys.platform == "darwin":
        boot = _output("sysctl", "-n", "kern.bootsessionuuid")
        return Machine(socket.gethostname(), machine, boot, "darwin")
    boot, namespace = _first_line("/proc/sys/kernel/random/boot_id"), ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return Machine(socket.gethostname(), machine, boot, namespace)


def start_of(pid: int) -> str:
    """Return when a process of this pid namespace started; empty if unknown, `ended` for one that is a zombie."""
    if sys.platform == "darwin":
        return _output("ps", "-o", "lstart=", "-p", str(pid))
    with suppress(OSError, IndexError):
        # After the name, which may hold spaces and brackets: the state, and in clock ticks since the boot the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "ended" if fields[0] in "ZXx" else fields[19]
    return ""


def fate_of(holder: Holder, here: Machine) -> Fate:
    """Return whether a holder lives, as far as its process and its machine show."""
    there = holder.at
    if not (there.boot and here.boot):
        return "unknown"
    if there.boot != here.boot:
        same = (there.host, there.machine) == (here.host, here.machine) and there.machine
        return "dead" if same and there.is_bare and here.is_bare else "unknown"
    if not here.namespace or there.namespace != here.namespace or holder.pid <= 0:
        return "unknown"
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return "dead"
    except PermissionError:
        pass  # another user's
    start = start_of(holder.pid)
    if not (start and holder.start):
        return "unknown"  # it is there, and nothing shows whether it is the same
    return "alive" if start == holder.start else "dead"


def _first_line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().partition("\n")[0].strip()
    return ""


def _output(*words: str) -> str:
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return ""


# --- the lease ---------------------------------------------------------------------------------


class Lease:
    """The lease of a workdir, to be used in a `with` block that begins when it is taken.

    Args:
      workdir: the folder, for messages.
      command: what the holder does, such as `train`.
      store: where the lease is stored.
      take_over: whether to take it from a holder that may be alive on another machine without waiting.
      log: prints a line.
    """

    def __init__(
        self,
        workdir: epath.Path,
        command: str,
        store: Store,
        take_over: bool = False,
        log: Callable[[str], None] = print,
        pace: Pace = Pace(),
        clock: Clock = Clock(),
        here: Machine | None = None,
    ):
        self._workdir, self._store, self._take_over, self._log = workdir, store, take_over, log
        self._pace, self._clock, self._here = pace, clock, here or this_machine()
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        pid = os.getpid()
        self._holder = Holder(
            uuid.uuid4().hex, command, self._here, pid, start_of(pid), now, 0, clock.now()
        )
        self._lost = ""
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="mmjax-lease", daemon=True)

    # -- taking --

    def take(self) -> None:
        """Take the lease, waiting for the heartbeat of a holder that may be dead.

        Raises:
          UserError: the holder lives; nothing has been written.
        """
        watch = _Watch(self._clock.now)
        while True:
            entry = self._store.read()
            left = self._patience(entry, watch)
            if left > 0:
                self._clock.sleep(min(left, self._pace.look))
            elif self._store.swap(entry, self._renewed().text()):
                return

    def _patience(self, entry: Entry, watch: _Watch) -> float:
        """Return the seconds for which the heartbeat has to stand still until the lease can be taken."""
        if entry.text is None:
            return 0.0
        holder = holder_of(entry.text)
        fate = fate_of(holder, self._here) if holder else "unknown"
        still = watch.stands_still(entry)
        if fate == "alive" or still is None:
            raise UserError(self._refusal(holder))
        if fate == "dead":
            return 0.0
        if holder and holder.at.boot and holder.at.boot == self._here.boot:
            still = max(still, self._clock.now() - holder.monotonic)
        left = 0.0 if self._take_over else self._pace.stale - still
        if watch.is_new(entry):
            self._announce(holder, left)
        return left

    def _refusal(self, holder: Holder | None) -> str:
        return (
            f"'{self._workdir}' is in use: {holder or 'another process'} writes there. Wait for its end, "
            "stop it, or use another --workdir. Nothing was changed."
        )

    def _announce(self, holder: Holder | None, left: float) -> None:
        who = str(holder) if holder else f"a {LEASE} that cannot be read"
        if self._take_over:
            self._log(f"Taking '{self._workdir}' over from {who}.")
        elif left > 0:
            self._log(
                f"Waiting up to {left:.0f} s for a sign of life in '{self._workdir}' from {who}; then its lease "
                "is taken over. --take_over skips the wait."
            )

    # -- holding --

    def check(self) -> None:
        """Ensure that this process still holds the lease; to be called before it writes.

        Raises:
          LeaseLostError: it does not.
        """
        with self._lock:
            self._look()
        if self._lost:
            raise LeaseLostError(self._lost)

    def beat(self) -> None:
        """Renew the heartbeat."""
        with self._lock:
            entry = self._look()
            if not self._lost and not self._store.swap(entry, self._renewed().text()):
                self._look()

    def _look(self) -> Entry:
        entry = self._store.read()
        if not self._lost and (entry.text is None or entry.id != self._holder.id):
            now = None if entry.text is None else holder_of(entry.text)
            who = f"{now} has taken it over" if now else f"its {LEASE} is gone"
            self._lost = (
                f"This process has lost the lease of '{self._workdir}': {who}. It stops before it writes more. "
                "What was saved before is not affected."
            )
        return entry

    def _renewed(self) -> Holder:
        self._holder = dataclasses.replace(
            self._holder, beat=self._holder.beat + 1, monotonic=self._clock.now()
        )
        return self._holder

    def _keep(self) -> None:
        while not self._done.wait(self._pace.beat) and not self._lost:
            # A full disk or a network that is away: the next heartbeat may succeed, and `check` looks for itself.
            with suppress(OSError, ValueError):
                self.beat()

    def release(self) -> None:
        """Give the lease back."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock, suppress(OSError, ValueError):
            entry = self._look()
            if not self._lost:
                self._store.swap(entry, None)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass
class _Watch:
    """Measures how long an entry does not change while this process watches it."""

    now: Callable[[], float]
    _first: Entry | None = None
    _since: float = 0.0
    _announced: set[str] = field(default_factory=set)

    def stands_still(self, entry: Entry) -> float | None:
        """Return the seconds since the entry was first seen; None if its holder has changed it since."""
        if self._first is None or self._first.id != entry.id:
            self._first, self._since = entry, self.now()
        return None if self._first.text != entry.text else self.now() - self._since

    def is_new(self, entry: Entry) -> bool:
        """Return whether this is the first call with a lease of this id."""
        is_new = entry.id not in self._announced
        self._announced.add(entry.id)
        return is_new


@contextmanager
def hold(
    workdir: epath.Path, command: str, take_over: bool = False, log: Callable[[str], None] = print
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a workdir, by process 0 for all processes of the run.

    Yields:
      A function to be called before each write: it raises `LeaseLostError` if the lease is lost. In processes other
      than process 0, which writes, it does nothing.

    Raises:
      UserError: in every process, if another run holds the lease; nothing has been written.
    """
    lease, refused = None, ""
    if processes.is_first():
        lease = Lease(workdir, command, store_of(workdir), take_over, log)
        try:
            lease.take()
        except UserError as error:
            refused = str(error)
    if refused := processes.gather(refused)[0]:
        processes.let_others_end()
        raise UserError(refused)
    if lease is None:
        yield lambda: None
        return
    with lease:
        yield lease.check
