"""Null implementations for processes that do not write a run's files: the same calls, and nothing comes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmjax.monitor.goodput import ActivityLog
from mmjax.monitor.metrics import MetricWriter


class NullMetrics(MetricWriter):
    """A `MetricWriter` without files."""

    def __init__(self) -> None:
        pass

    def write(self, *_: Any) -> None:
        pass

    def write_eval(self, *_: Any) -> None:
        pass

    def add(self, *_: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class NullActivities(ActivityLog):
    """A `ActivityLog` without a file."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def activity(self, *_: Any, **__: Any) -> Iterator[None]:
        yield

    def add(self, *_: Any) -> None:
        pass

    def beat(self, **_: Any) -> None:
        pass

    def event(self, *_: Any, **__: Any) -> None:
        pass

    def close(self) -> None:
        pass
