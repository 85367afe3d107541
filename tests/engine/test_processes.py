"""Check what one process asks of the others, and how it joins them."""

from __future__ import annotations

import socket
import threading
from argparse import Namespace
from unittest import mock

import pytest

from mmjax.core.errors import UserError
from mmjax.engine import processes


@pytest.mark.parametrize(
    "words",
    [
        ["--processes=2", "--process=0"],
        ["--coordinator=h:1", "--processes=two", "--process=0"],
        ["--coordinator=h:1", "--processes=2"],
        ["--coordinator=h:1", "--processes=2", "--process=2"],
    ],
    ids=" ".join,
)
def test_numbers_that_name_no_process_are_refused(words: list[str]) -> None:
    from mmjax.core import flags

    parser = flags.parser("A main.")
    processes.add_arguments(parser)
    arguments, _ = flags.parse(parser, words)
    with pytest.raises(UserError, match="--processes="):
        processes.join(arguments)


def test_alone_a_process_agrees_with_itself() -> None:
    assert processes.gather({"a": [1]}) == [{"a": [1]}]
    assert processes.is_first()


@pytest.mark.parametrize(
    ("each", "found"),
    [
        ([0.1, 0.9, 0.2], (1, 0.9, 0.15)),
        ([0.1, 0.9, 0.4], (1, 0.9, 0.25)),
        ([0.4, 0.9, 0.4], None),  # not three times the others
        ([0.001, 0.09, 0.001], None),  # nothing beside a step
        ([0.9, 0.9], None),
        ([0.9], None),
    ],
)
def test_only_a_process_that_stands_out_is_slow(
    each: list[float], found: tuple[int, float, float] | None
) -> None:
    assert processes.stands_out(each, least=0.1) == (found and pytest.approx(found))


def join(where: str, process: int = 0) -> None:
    processes.join(Namespace(coordinator=where, processes="2", process=str(process)))


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_a_port_that_another_program_listens_on_is_told_before_jax_ends_by_it(host: str) -> None:
    with socket.create_server((host, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=f"cannot listen at port {port} of this machine .*in use"
        ):
            join(f"10.0.0.1:{port}")


@pytest.mark.parametrize("where", ["host", "host:", "host:0", "host:65536", "host:-1", "host:x"])
def test_a_coordinator_needs_a_port(where: str) -> None:
    with pytest.raises(UserError, match="give HOST:PORT"):
        join(where)


def test_a_port_that_was_in_use_just_now_is_free() -> None:
    """Connections of an ended server linger."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # closes first, and so lingers
        client.close()
    processes._check_port(f"127.0.0.1:{port}")


def test_a_process_that_waits_for_the_others_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    told = threading.Event()
    printing = mock.patch("builtins.print", lambda *a, **k: told.set())
    with printing, processes._notice_after(0.0, "mmjax: waiting for the other processes"):
        assert told.wait(60)
    with processes._notice_after(1000.0, "never"):
        pass
    assert "never" not in capsys.readouterr().err
