"""Leases, machines and clocks for the tests of leases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from etils import epath

from mmjax.engine.lease import (
    Clock,
    Holder,
    Lease,
    Machine,
)
from mmjax.engine.lease_store import Store

BARE = "pid:[4026531836]"  # the first pid namespace of every Linux kernel
HOST = Machine("here", "m1", "boot1", BARE)
OTHER = Machine("there", "m2", "boot2", BARE)
ID = "0" * 31


def lease_text(number: int, **more: Any) -> bytes:
    """Return a lease with the id 00...`number`, of a process that has ended here unless `more` sets another."""
    return replace(dead(), id=f"{ID}{number:x}", **more).text()


def dead() -> Holder:
    return Holder(ID + "0", "train", HOST, 2**22 + 1, "7", "2026-01-01 00:00:00 UTC", 3, 0.0)


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
