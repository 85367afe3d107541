"""Compiles cases in processes of their own: one that crashes or takes too long costs only its case."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

from mmjax.core.errors import UserError
from mmjax.plan.case import Specification
from mmjax.plan.topology import environment

_START = 300.0  # seconds in which a process must have read its config and described the machine
_TAIL = 400  # characters of a process's last output


@dataclass(frozen=True)
class Reports:
    """The compiler's reports on a config.

    Attributes:
      facts: of the machine and mesh, as `Cases.facts` gives them.
      cases: program name -> report, in order; `status` is `compiled`, `out_of_memory`, `failed`,
        `crashed` or `time_limit`.
    """

    facts: dict[str, Any]
    cases: dict[str, dict[str, Any]]


class _Lost(Exception):
    """A process that ended, or was ended, before it had answered."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.report = {"status": status, "message": message}


def compile_cases(specification: Specification, seconds: float) -> Reports:
    """Report on every program of a specification.

    A process continues from one case to the next; when it is lost, another continues after that case.

    Args:
      seconds: after which a case is given up.

    Raises:
      UserError: the config or the topology is wrong.
    """
    facts: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {}
    left = specification.names
    while left is None or left:
        with _Worker(replace(specification, names=left)) as worker:
            try:
                facts = facts or {}
                ready = worker.answer(_START)["ready"]
            except _Lost as lost:
                raise UserError(f"The process that compiles did not start: {lost}") from lost
            facts = facts or ready
            left = list(ready["names"])
            for name, report in _answers(worker, list(left), seconds):
                cases[name] = report
                left.remove(name)
    return Reports(facts, cases)


def _answers(
    worker: _Worker, names: list[str], seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the reports of a process, up to and with the case that it was lost at."""
    for name in names:
        try:
            yield name, worker.answer(seconds)
        except _Lost as lost:
            yield name, lost.report
            return


class _Worker:
    """A process of `mmjax.plan.case`."""

    def __init__(self, specification: Specification):
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with _deep_stack():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mmjax.plan.case"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                env=environment(), start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._lines = _Lines(self._process.stdout.fileno())
        self._process.stdin.write(specification.to_json().encode())
        self._process.stdin.close()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Return the next line; raises if none comes in time."""
        line = self._lines.next(seconds)
        if line is None:
            self._kill()
            raise _Lost("time_limit", f"not compiled after {seconds:g} seconds")
        if not line:
            raise _Lost("crashed", self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace").split()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"the compiler's process ended by {how}. {' '.join(tail)[-_TAIL:]}".strip()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


class _Lines:
    """Lines of a pipe, with a limit on the time that each takes."""

    def __init__(self, descriptor: int):
        self._descriptor, self._buffer = descriptor, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)

    def next(self, seconds: float) -> bytes | None:
        """Return the next line; empty at the end, None if it does not come in time."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                return None
            read = os.read(self._descriptor, 1 << 16)
            if not read:
                return b""
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


class _deep_stack:
    """Processes started within have as much stack as this one may ask for: the compiler recurses deeply."""

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_STACK)
        most = self._before[1]
        resource.setrlimit(resource.RLIMIT_STACK, (most, most))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_STACK, self._before)
