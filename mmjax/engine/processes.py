"""Several processes, one run: how one joins, and what they agree on outside of their programs.

All processes run the same main and ask the same questions in the same order. Process 0 writes the files
and prints; every process writes its own shards of a checkpoint, and its errors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.core.errors import UserError
from mmjax.core.sharding import replicated
from mmjax.engine.compile import Request, compile_silently
from mmjax.monitor.compiling import Compiling

_PATIENCE = 3600  # seconds that a process waits for the slowest; one that died ends all much sooner
_PATIENT = 15.0  # seconds after which a process reports that it waits to join
LIFELINE = "MMJAX_LIFELINE"  # the descriptor of a pipe whose other end the launcher holds, see launch/jobs.py
_LAST = 2.0  # seconds by which process 0 outlives the others
_SLOW = 3  # times the median of the others, from which on a process is named
_questions = itertools.count()


def compiling(requests: Mapping[str, Request], *others: str) -> Compiling:
    """Return the progress of programs to be compiled, and of `others` by their own words; process 0 shows it."""
    labels = {name: f"{request.task} {request.kind}" for name, request in requests.items()}
    return Compiling(labels | {words: words for words in others}, muted=not is_first())


# --- joining -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--coordinator`, `--processes` and `--process`, with defaults from the environment."""
    parser.add_argument(
        "--coordinator", default=os.environ.get("MMJAX_COORDINATOR", ""), metavar="HOST:PORT",
        help="where process 0 listens, or `auto` where JAX finds it (TPU, Slurm); MMJAX_COORDINATOR",
    )  # fmt: skip
    for name, words in (
        ("processes", "how many processes make up the run"),
        ("process", "which of them this is, from 0"),
    ):
        variable = f"MMJAX_{name.upper()}"
        parser.add_argument(
            f"--{name}", default=os.environ.get(variable, ""), metavar="N",
            help=f"{words}; {variable}",
        )  # fmt: skip


def join(arguments: argparse.Namespace) -> None:
    """Join the other processes of the run, before anything asks for devices; alone, do nothing.

    A process of a pod that `launch/local_pod.sh` started ends with its launcher from here on.

    Raises:
      UserError: numbers that name no process; a port of the coordinator that another program listens on.
    """
    _follow_launcher()
    where, count, index = arguments.coordinator, arguments.processes, arguments.process
    if where == "auto":
        jax.distributed.initialize()
    elif where or count or index:
        numbers = _numbers(where, count, index)
        if numbers[1] == 0:
            _check_port(where)
        with _notice_after(
            _PATIENT, f"mmjax: waiting for the other processes of the run at {where}"
        ):
            jax.distributed.initialize(where, *numbers)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _check_port(where: str) -> None:
    """Raise if process 0 cannot listen at the coordinator's port; JAX would end without a word."""
    port = where.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={where}: give HOST:PORT, with a port from 1 to 65535.")
    families = (
        [socket.AF_INET6, socket.AF_INET] if socket.has_dualstack_ipv6() else [socket.AF_INET]
    )
    for family in families:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise UserError(
                    f"--coordinator={where}: process 0 cannot listen at port {port} of this machine "
                    f"({error.strerror}). Give another port to all processes."
                ) from error


@contextmanager
def _notice_after(seconds: float, words: str) -> Iterator[None]:
    """Print a line on standard error if the block takes longer."""
    timer = threading.Timer(seconds, print, (words,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _follow_launcher() -> None:
    """End this process when its launcher ends, whose end of a pipe the system closes then."""
    number = os.environ.pop(LIFELINE, "")
    if not number.isdecimal():
        return

    def follow() -> None:
        try:
            os.read(int(number), 1)
        except OSError:
            return  # the pipe was not handed on: nothing is known of the launcher
        os.write(2, b"mmjax: the launcher of this process has ended, and so it ends too\n")
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=follow, name="mmjax-lifeline", daemon=True).start()


def _numbers(where: str, count: str, index: str) -> tuple[int, int]:
    words = f"--coordinator={where} --processes={count} --process={index}"
    if not (where and count.isdecimal() and index.isdecimal()):
        raise UserError(f"{words}: give HOST:PORT, a count and a number from 0, or none of them.")
    if int(index) >= int(count):
        raise UserError(f"{words}: the processes are 0 to {int(count) - 1}.")
    return int(count), int(index)


def is_first() -> bool:
    """Return whether this process writes the run's files and prints to the terminal."""
    return jax.process_index() == 0


# --- agreeing ----------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Return the JSON `value` of each process, in order, once all have asked; alone, `[value]`."""
    count, client = jax.process_count(), global_state.client
    if count == 1 or client is None:
        return [value]
    number = next(_questions)
    mine = f"mmjax/{number}/{jax.process_index()}"
    client.key_value_set(mine, json.dumps(value))
    result = [
        json.loads(client.blocking_key_value_get(f"mmjax/{number}/{i}", _PATIENCE * 1000))
        for i in range(count)
    ]
    if number:  # all have asked again, so all have read the answers before
        client.key_value_delete(f"mmjax/{number - 1}/{jax.process_index()}")
    return result


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Check that all processes were started alike: the same `facts` (of config, devices, versions) by key.

    Raises:
      UserError: in every process, where one differs from process 0.
    """
    first, *others = gather(dict(facts))
    for index, other in enumerate(others, 1):
        keys = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
        if keys:
            words = "; ".join(f"{k}: {first.get(k)} there, {other.get(k)} here" for k in keys[:5])
            omitted = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            let_others_end()
            raise UserError(
                f"Process {index} was started differently from process 0: {words}{omitted}. Start all with the "
                "same config, flags and versions."
            )


def let_others_end() -> None:
    """Wait until the other processes have ended, on process 0, which hosts the coordination service.

    The others lose their connection when it ends, so it must end last.
    """
    wait_for_all()
    if is_first():
        time.sleep(_LAST)


def slowest(seconds: float, least: float) -> tuple[int, float, float] | None:
    """Return the result of `stands_out` for the `seconds` that every process gives for itself."""
    return stands_out(gather(seconds), least)


def stands_out(seconds: Sequence[float], least: float) -> tuple[int, float, float] | None:
    """Return the process that its own work on the host holds up: its number, its seconds and the others' median.

    Args:
      seconds: the seconds of every process, for a step's batch.
      least: what counts; a process is slow above this, and above three times the others' median.
    """
    index = max(range(len(seconds)), key=seconds.__getitem__)
    others = [*seconds[:index], *seconds[index + 1 :]]
    if not others:
        return None
    usual = statistics.median(others)
    return (index, seconds[index], usual) if seconds[index] > max(least, _SLOW * usual) else None


def wait_for_all() -> None:
    """Wait until every process has reached this call."""
    gather(None)


class Vote:
    """A vote of all processes, counted on the devices while steps continue.

    Ballots are cast at the same places of the loop by all processes, and each is counted `lag` ballots
    later, when its answer has long been there. So all stop before the same step, and none waits.
    """

    def __init__(self, mesh: Mesh, lag: int):
        self._mesh, self._lag = mesh, lag
        self._under_way: deque[jax.Array] = deque()
        self._one_per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        if jax.process_count() > 1:
            shape = jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=self._one_per_device)
            self._sum = compile_silently(lambda x: x.sum(), shape, replicated(mesh), mesh)

    def cast(self, yes: bool) -> bool:
        """Cast a ballot; return whether any was yes `lag` ballots ago. Alone, the answer is `yes`."""
        if jax.process_count() == 1:
            return yes
        parts = [
            jax.device_put(np.full(1, yes, np.int32), d) for d in self._mesh.local_mesh.devices.flat
        ]
        ballot = jax.make_array_from_single_device_arrays(
            (self._mesh.size,), self._one_per_device, parts
        )
        self._under_way.append(self._sum(ballot))
        return len(self._under_way) > self._lag and self._count()

    def settle(self, yes: bool) -> bool:
        """Return whether any process votes yes now, or did in a ballot that is not yet counted."""
        answers = [self._count() for _ in range(len(self._under_way))]
        return any([*answers, *gather(yes)])

    def _count(self) -> bool:
        return bool(jax.device_get(self._under_way.popleft()))
