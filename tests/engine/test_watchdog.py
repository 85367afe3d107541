"""A process in which nothing moves is ended with words; one that moves, or was suspended, is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mmjax.engine.watchdog import STUCK

START = """
import ctypes, os, sys, threading, time
from mmjax.engine.watchdog import Watchdog
def log(text):
    print("log:", text, flush=True)
def dog(limit, write=log):
    return Watchdog(limit, write)
"""

ENDS = {
    "nothing moves": (
        "with dog(0.5) as d: d.at('saving', 'one', 7); threading.Event().wait()",
        STUCK,
        ["nothing has moved for", "saving, step 7, task one", "in wait", "Thread 0x"],
    ),
    "nothing moves from the beginning": (
        "with dog(0.5): threading.Event().wait()",
        STUCK,
        ["beginning"],
    ),
    "another thread is what hangs": (
        "def inner_work():\n    time.sleep(1000)\n"
        "t = threading.Thread(target=inner_work); t.start()\n"
        "with dog(0.5) as d: d.at('waiting for data'); t.join()",
        STUCK,
        ["waiting for data", "in inner_work", "in join"],
    ),
    "the log of the run hangs too": (
        "with dog(0.5, lambda text: time.sleep(1000)): threading.Event().wait()",
        STUCK,
        ["stuck"],
    ),
    # `PyDLL` keeps the interpreter's lock: no other thread of Python runs.
    "a library lets no thread run": (
        "with dog(0.5) as d: time.sleep(0.2); ctypes.PyDLL(None).sleep(1000)",
        -signal.SIGALRM,
        ["Thread 0x", 'File "<string>", line'],
    ),
}


def process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_is_stuck_is_ended_with_words(how: str) -> None:
    code, status, words = ENDS[how]
    started = process(code)
    out, err = started.communicate(timeout=120)
    assert started.returncode == status, err
    assert all(word in err for word in words), err
    if "log" not in how and status == STUCK:
        assert out.startswith("log: nothing has moved for") and "limits.watchdog_seconds" in err


LIVES = {
    # Twice the limit in all, and never an eighth of it at once.
    "slow and moving": "with dog(2) as d:\n for i in range(16): d.at('a step', 'one', i); time.sleep(.25)",
    "no limit": "with dog(0) as d: time.sleep(2)",
    "the clock on the wall jumps": (
        "wall = time.time\ntime.time = lambda: wall() + 1e6\n"
        "with dog(2) as d: time.sleep(0.5); time.time = lambda: 0.0; time.sleep(0.5)"
    ),
}


@pytest.mark.parametrize("how", LIVES)
def test_one_that_moves_is_left_alone(how: str) -> None:
    started = process(LIVES[how] + "\nprint('ended well')")
    out, err = started.communicate(timeout=120)
    assert (started.returncode, out, err) == (0, "ended well\n", "")


def test_one_that_was_suspended_is_left_alone() -> None:
    """As by a debugger, or a machine that sleeps: for longer than the limit."""
    started = process(
        "print('there', flush=True)\nwith dog(2) as d: time.sleep(1)\nprint('ended well')"
    )
    assert started.stdout is not None and started.stdout.readline() == "there\n"
    started.send_signal(signal.SIGSTOP)
    time.sleep(3)
    started.send_signal(signal.SIGCONT)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, out, err) == (0, "ended well\n", "")


def test_it_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    import threading

    from mmjax.engine.watchdog import Watchdog

    told: list[str] = []
    say: Callable[[str], None] = told.append
    with Watchdog(1, say) as dog:
        dog.at("a step")
    time.sleep(1.5)
    assert not [t for t in threading.enumerate() if t.name == "mmjax-watchdog"] and not told
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert capfd.readouterr() == ("", "")
