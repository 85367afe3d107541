"""Processes that compile: answers in time, late, or none."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import pytest

from mmjax.core.errors import UserError
from mmjax.plan import workers
from mmjax.plan.case import Specification

NAMES = ["one", "two", "three"]
SPECIFICATION = Specification({}, [], "v5e", (2, 2), 1, NAMES, False, "")

# Stands in for `mmjax.plan.case`: answers for each program, but dies or sleeps at the second one.
PROCESS = """
import json, os, signal, sys, time
names = json.load(sys.stdin)["names"]
def put(line): print(json.dumps(line), flush=True)
put({READY})
for name in names:
    if name == "two":
        ACTION
    put({"name": name, "status": "compiled", "process": os.getpid()})
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `started(action)`, which puts a process in place of the one that compiles."""

    def put(action: str, ready: str = '"ready": {"names": names}') -> None:
        code = PROCESS.replace("ACTION", action).replace("READY", ready)
        start = workers.subprocess.Popen

        def other(words: Any, **options: Any) -> Any:
            assert words[1:] == ["-m", "mmjax.plan.case"]
            return start([sys.executable, "-S", "-c", code], **options)

        monkeypatch.setattr(workers.subprocess, "Popen", other)

    return put


def test_one_process_answers_for_all_programs_in_order(started: Any) -> None:
    started("pass")
    reports = workers.compile_cases(SPECIFICATION, 60.0)
    assert list(reports.cases) == NAMES and reports.facts == {"names": NAMES}
    assert {r["status"] for r in reports.cases.values()} == {"compiled"}
    assert len({r["process"] for r in reports.cases.values()}) == 1


def test_a_process_that_crashes_costs_its_program_only(started: Any) -> None:
    started(
        "print('the stack is too small', file=sys.stderr); sys.stderr.flush(); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    cases = workers.compile_cases(SPECIFICATION, 60.0).cases
    assert [cases[name]["status"] for name in NAMES] == ["compiled", "crashed", "compiled"]
    assert "signal SIGSEGV. the stack is too small" in cases["two"]["message"]
    assert cases["one"]["process"] != cases["three"]["process"]


def test_a_process_that_ends_by_itself_states_its_exit_status(started: Any) -> None:
    started("sys.exit(7)")
    assert "exit status 7" in workers.compile_cases(SPECIFICATION, 60.0).cases["two"]["message"]


def test_a_program_that_takes_too_long_is_given_up_and_the_next_one_is_not(started: Any) -> None:
    started("time.sleep(600)")
    cases = workers.compile_cases(SPECIFICATION, 2.0).cases
    assert cases["two"] == {"status": "time_limit", "message": "not compiled after 2 seconds"}
    assert [cases[name]["status"] for name in ("one", "three")] == ["compiled", "compiled"]


def test_an_error_of_the_users_is_raised_with_its_words(started: Any) -> None:
    started("pass", ready='"error": "mesh.data is 3"')
    with pytest.raises(UserError, match="mesh.data is 3"):
        workers.compile_cases(SPECIFICATION, 60.0)


def test_a_process_that_does_not_start_is_an_error(started: Any) -> None:
    started("pass", ready="1 / 0")
    with pytest.raises(UserError, match="did not start.*ZeroDivisionError"):
        workers.compile_cases(SPECIFICATION, 60.0)


def test_lines_are_put_together_from_pieces() -> None:
    read, write = os.pipe()
    lines = workers._Lines(read)
    os.write(write, b'{"a": 1}\n{"b"')
    assert json.loads(lines.next(10.0) or b"") == {"a": 1}
    assert lines.next(0.01) is None
    rest = threading.Timer(0.05, os.write, (write, b": 2}\n"))
    rest.start()
    assert json.loads(lines.next(10.0) or b"") == {"b": 2}
    rest.join()
    os.close(write)
    assert lines.next(10.0) == b""
    os.close(read)


def test_the_stack_limit_is_raised_within_and_put_back() -> None:
    before = workers.resource.getrlimit(workers.resource.RLIMIT_STACK)
    with workers._deep_stack():
        within = workers.resource.getrlimit(workers.resource.RLIMIT_STACK)
        assert within == (before[1], before[1])
    assert workers.resource.getrlimit(workers.resource.RLIMIT_STACK) == before
