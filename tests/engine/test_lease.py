"""The lease on a workdir: one holder, a dead one's is taken, a live one's is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toyrun
from etils import epath
from leases import BARE, HOST, ID, OTHER, Time, dead, lease, lease_text, put
from mains import refused

from mmjax import train
from mmjax.core.errors import UserError
from mmjax.engine import checkpoint, lease_store
from mmjax.engine.lease import (
    Holder,
    LeaseLostError,
    Pace,
    fate_of,
    holder_of,
    start_of,
    this_machine,
)
from mmjax.engine.lease_store import FileStore, Store, identity
from mmjax.monitor.line_file import LineFile
from mmjax.training import flight

# --- is the holder alive -----------------------------------------------------------------------


def mine(**more: Any) -> Holder:
    return replace(dead(), at=this_machine(), pid=os.getpid(), start=start_of(os.getpid()), **more)


def test_a_living_process_is_alive_and_one_of_another_start_is_dead() -> None:
    here = this_machine()
    assert here.boot and here.namespace.startswith("pid:[")
    assert fate_of(mine(), here) == "alive"
    assert fate_of(replace(mine(), start="1"), here) == "dead"


def test_a_process_that_is_gone_or_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    holder = replace(mine(), pid=child.pid, start=start_of(child.pid))
    assert fate_of(holder, this_machine()) == "alive"
    child.kill()
    os.waitid(
        os.P_PID, child.pid, os.WEXITED | os.WNOWAIT
    )  # it has ended, and no process has asked for its status
    assert fate_of(holder, this_machine()) == "dead"
    child.wait()
    assert fate_of(holder, this_machine()) == "dead"


CONTAINER = "pid:[4026532456]"


@pytest.mark.parametrize(
    ("change", "here", "fate"),
    [
        ({}, {"boot": "boot2"}, "dead"),  # the machine has booted since
        ({}, {"boot": "boot2", "machine": "m2"}, "unknown"),  # another machine of that name
        ({}, {"boot": "boot2", "host": "other"}, "unknown"),  # another machine of that image
        ({"machine": ""}, {"boot": "boot2", "machine": ""}, "unknown"),
        ({"namespace": CONTAINER}, {"boot": "boot2", "namespace": CONTAINER}, "unknown"),
        ({"namespace": CONTAINER}, {"boot": "boot2"}, "unknown"),
        (
            {"namespace": CONTAINER},
            {},
            "unknown",
        ),  # a container on this machine, with numbers of its own
        ({}, {"namespace": CONTAINER}, "unknown"),
        ({"namespace": CONTAINER}, {"namespace": CONTAINER}, "dead"),  # in the same container
        ({"boot": ""}, {"boot": ""}, "unknown"),
        ({"namespace": ""}, {"namespace": ""}, "unknown"),
    ],
)
def test_process_numbers_count_only_where_they_mean_something(
    change: dict[str, str], here: dict[str, str], fate: str
) -> None:
    """The process of the lease is gone, where its number is one of this machine's."""
    holder = replace(dead(), at=replace(HOST, **change))
    assert fate_of(holder, replace(HOST, **here)) == fate


@pytest.mark.parametrize("pid", [0, -1, 2**70])
def test_a_number_that_is_no_process_asks_no_process(pid: int) -> None:
    assert fate_of(replace(mine(), pid=pid), this_machine()) in ("unknown", "dead")


# --- taking ------------------------------------------------------------------------------------


def test_a_free_lease_is_taken_and_names_its_holder(store: Store) -> None:
    lease(store).take()
    text = store.read().text
    assert text is not None
    holder = holder_of(text)
    assert holder and (holder.command, holder.at, holder.pid) == ("train", HOST, os.getpid())
    assert json.loads(text)["at"] == {
        "host": "here", "machine": "m1", "boot": "boot1", "namespace": BARE,
    }  # fmt: skip


def test_a_dead_holder_is_replaced_at_once(store: Store) -> None:
    put(store, lease_text(1))
    time, said = Time(), list[str]()
    lease(store, time, log=said.append).take()
    assert (time.slept, said) == ([], []) and store.read().id != ID + "1"


def test_a_live_holder_is_named_and_nothing_changes(store: Store) -> None:
    here = this_machine()
    first = lease(store, here=here)
    first.take()
    before = store.read().text
    for take_over in (False, True):
        with pytest.raises(
            UserError, match=rf"train, process {os.getpid()} on {here.host} since 20"
        ):
            lease(store, here=here, take_over=take_over).take()
    assert store.read().text == before
    first.check()


@pytest.mark.parametrize(
    "text", [lease_text(1, at=OTHER), b"", b"{", b'{"id": 7}', b"\xff\x00", b"[]"]
)
def test_a_heartbeat_elsewhere_that_stands_still_for_a_minute_is_dead(
    text: bytes, store: Store
) -> None:
    put(store, text)
    time, said = Time(), list[str]()
    lease(store, time, log=said.append).take()
    assert sum(time.slept) == 60 and holder_of(store.read().text or b"").pid == os.getpid()  # type: ignore[union-attr]
    [line] = said
    assert line.startswith("Waiting up to 60 s for a sign of life in '/runs/x' from ")
    assert "--take_over" in line and ("there" in line) == (text != b"" and b"there" in text)


def test_a_heartbeat_that_moves_is_a_live_holder(store: Store) -> None:
    put(store, lease_text(1, at=OTHER))

    def beat(now: float) -> None:
        if now == 1030:
            put(store, lease_text(1, at=OTHER, beat=4))

    time = Time(during=beat)
    with pytest.raises(UserError, match="process 4194305 on there since 2026-01-01"):
        lease(store, time, log=lambda _: None).take()
    assert sum(time.slept) == 30 and store.read().text == lease_text(1, at=OTHER, beat=4)


def test_another_who_takes_it_first_is_watched_from_then_on(store: Store) -> None:
    put(store, lease_text(1, at=OTHER))

    def took(now: float) -> None:
        if now == 1059:
            put(store, lease_text(2, at=OTHER))

    time, said = Time(during=took), list[str]()
    lease(store, time, log=said.append).take()
    assert sum(time.slept) == 119 and len(said) == 2


def test_take_over_skips_the_wait(store: Store) -> None:
    put(store, lease_text(1, at=OTHER))
    time, said = Time(), list[str]()
    lease(store, time, log=said.append, take_over=True).take()
    assert time.slept == [] and said[0].startswith("Taking '/runs/x' over from train, process")


@pytest.mark.parametrize(("beaten", "waits"), [(1000.0, 60), (960.0, 20), (900.0, 0), (5000.0, 60)])
def test_one_boot_has_one_clock_that_shortens_the_wait(
    beaten: float, waits: float, store: Store
) -> None:
    """Containers on one machine; a clock that is ahead shortens nothing."""
    text = lease_text(1, at=replace(HOST, namespace=CONTAINER), monotonic=beaten)
    put(store, text)
    time = Time(now=1000.0)
    lease(store, time, log=lambda _: None).take()
    assert sum(time.slept) == waits


# --- holding -----------------------------------------------------------------------------------


def test_the_heartbeat_moves_and_the_id_stays(store: Store) -> None:
    held, time = lease(store), Time()
    held.take()
    before = store.read()
    held.beat()
    after = store.read()
    assert after.id == before.id and after.text != before.text
    held.check()
    held.release()
    assert store.read().text is None and time.slept == []


def test_a_thread_beats_until_the_lease_is_given_back(store: Store) -> None:
    held = lease(store, pace=Pace(beat=0.001))
    held.take()
    with held:
        limit = time.monotonic() + 60
        while holder_of(store.read().text or b"").beat < 5:  # type: ignore[union-attr]
            assert time.monotonic() < limit
    assert store.read().text is None
    assert "mmjax-lease" not in [t.name for t in threading.enumerate()]


def test_a_disk_that_is_full_for_a_while_costs_no_lease(store: Store) -> None:
    held = lease(store, pace=Pace(beat=0.001))
    held.take()
    real, failed = store.swap, threading.Event()

    def full(*_: Any) -> bool:
        failed.set()
        raise OSError(28, "No space left on device")

    store.swap = full  # type: ignore[method-assign]
    with held:
        assert failed.wait(60)
        held.check()
        store.swap = real  # type: ignore[method-assign]
        before = store.read().text
        limit = time.monotonic() + 60
        while store.read().text == before:
            assert time.monotonic() < limit


@pytest.mark.parametrize("taken", [True, False])
def test_a_lease_that_was_lost_is_told_and_stays_the_others(taken: bool, store: Store) -> None:
    held = lease(store)
    held.take()
    put(store, lease_text(2, at=OTHER)) if taken else store.swap(store.read(), None)
    held.beat()
    with pytest.raises(LeaseLostError, match="on there since" if taken else "lease.json is gone"):
        held.check()
    held.release()
    assert store.read().text == (lease_text(2, at=OTHER) if taken else None)


def test_lines_stop_when_the_lease_is_lost(tmp_path: Path) -> None:
    lost = False

    def guard() -> None:
        if lost:
            raise LeaseLostError("lost")

    path = epath.Path(tmp_path) / "lines"
    lines = LineFile(path, guard)
    lines.append("one\n")
    lines.sync()
    lost = True
    lines.append("two\n")
    with pytest.raises(LeaseLostError):
        lines.sync()


# --- a run -------------------------------------------------------------------------------------


def contents(workdir: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in workdir.rglob("*") if p.is_file())
    return {str(p.relative_to(workdir)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


WORDS = (f"--extra={toyrun.EXTRA}", f"--config={toyrun.CONFIG}", "--config.mesh.data=8")


def test_a_second_run_in_a_live_workdir_changes_nothing(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    toyrun.run(workdir, "steps=4")
    put(FileStore(workdir), mine().text())
    before, folder = contents(workdir), workdir.stat().st_mtime_ns
    said = refused(train.main, *WORDS, f"--workdir={workdir}")
    assert f"train, process {os.getpid()} on {this_machine().host}" in said and "in use" in said
    assert contents(workdir) == before and workdir.stat().st_mtime_ns == folder


def test_a_run_holds_a_lease_while_it_writes_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(FileStore(tmp_path), replace(dead(), at=this_machine()).text())  # of one that was killed
    seen, save = list[str](), checkpoint.Checkpoints.save

    def noted(*arguments: Any, **more: Any) -> None:
        seen.append(FileStore(tmp_path).read().id)
        save(*arguments, **more)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", noted)
    toyrun.run(tmp_path)
    assert len(seen) == 3 and len(set(seen)) == 1 and seen[0] != dead().id
    assert not list(tmp_path.glob("lease*"))


@pytest.mark.parametrize("step", [5, 11])
def test_a_run_that_loses_its_lease_saves_nothing_more(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, calls = flight.place, [0]

    def placed(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            put(FileStore(tmp_path), lease_text(2, at=OTHER))
        return place(*arguments)

    monkeypatch.setattr(flight, "place", placed)
    with pytest.raises(LeaseLostError, match="process 4194305 on there since"):
        toyrun.run(tmp_path, "log.flush_every=1")
    assert checkpoint.steps(epath.Path(tmp_path))[0] == step // 4 * 4
    assert FileStore(tmp_path).read().text == lease_text(2, at=OTHER)
    assert not (tmp_path / "results.json").exists()
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) < step


def test_the_id_of_hostile_text_is_no_path() -> None:
    for text in (b'{"id": "../../x"}', b'{"id": 7}', b"[]", b"", b'{"id": "' + b"0" * 33 + b'"}'):
        assert len(identity(text)) == 32 and identity(text).isalnum()
    assert lease_store.identity(lease_text(1)) == ID + "1"
