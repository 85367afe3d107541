"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any


class Signals:
    """Notes SIGTERM and SIGINT, so that the loop can save before it ends; a second one ends it at once.

    Use it in a `with` block; outside of it these signals do what they did before.

    Attributes:
      received: the name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(ValueError):  # not the main thread: a notebook or a test's worker
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
