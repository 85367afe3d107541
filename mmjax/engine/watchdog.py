"""Watchdog: ends a run that makes no progress, and prints what it was doing and the stacks of its threads.

A separate thread watches. If a library never returns to Python, that thread is blocked too; then
the operating system ends the process with SIGALRM, also after the stacks.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

STUCK = 4  # exit status
_LOOKS = 20  # in the time of the limit
_LAST_WORDS = 5.0  # seconds for the log of the run: the disk may be what is stuck


class Watchdog:
    """Ends the process when nothing moves for `limit` seconds, to be used in a `with` block.

    `at` announces what begins, and that what came before is done. Only the time from one call to the next
    counts, so a run that is slow and moves is left alone; and only time in which this process could run,
    so one that was suspended, or whose machine slept, is left alone too.

    Args:
      limit: seconds; 0 for no end.
      log_text: writes the last words to the log of the run.
    """

    def __init__(self, limit: float, log_text: Callable[[str], None] = lambda text: None) -> None:
        self._limit, self._log_text = limit, log_text
        self._doing, self._moves = "beginning", 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="mmjax-watchdog", daemon=True)

    def at(self, doing: str, task: str = "", step: int | None = None) -> None:
        """Restart the clock: `doing` begins, of a task and a step where it has them."""
        self._doing = ", ".join(
            [doing, *([f"step {step}"] if step is not None else []), *([f"task {task}"] if task else [])]
        )  # fmt: skip
        self._moves += 1

    def __enter__(self) -> Self:
        if self._limit > 0:
            faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._limit > 0:
            self._thread.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def _look(self) -> None:
        tick = self._limit / _LOOKS
        seen, still, looked = self._moves, 0.0, time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            still += min(now - looked, 2 * tick)
            looked = now
            if self._moves != seen:
                seen, still = self._moves, 0.0
            if still > self._limit:
                self._end(still)
            signal.setitimer(signal.ITIMER_REAL, 2 * self._limit)

    def _end(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, 4 * _LAST_WORDS)
        text = f"nothing has moved for {seconds:.0f} s: {self._doing}"
        os.write(2, f"\nmmjax: stuck: {text}. Stacks of all threads:\n\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        os.write(
            2,
            b"\nRun again to resume. config.limits.watchdog_seconds sets the time, 0 for never.\n",
        )
        log = threading.Thread(target=self._log_text, args=(text,), daemon=True)
        log.start()
        log.join(_LAST_WORDS)
        sys.stdout.flush()
        os._exit(STUCK)
