"""Errors of the surroundings become one line and status 2; our own mistakes stay loud."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mains import run

from mmjax.core.errors import UserError, nearest, report

# As TensorStore words it when Orbax writes a checkpoint.
TENSORSTORE = (
    '{code}: Error writing local file "/runs/x/checkpoints/8/state/_sharding": Failed writing: '
    '"/runs/x/checkpoints/8/state/_sharding.__lock": Failed to write 57715 bytes to file 13: '
    "{words} [os_error_code='{number}'] [source locations='a.cc:1']"
)


def failing(error: BaseException):
    def main(_):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("Do that."), ["Do that."]),
        (OSError(errno.ENOSPC, "No space", "/runs/x/metrics.jsonl"), ["No space", "metrics.jsonl"]),
        (OSError(errno.EDQUOT, "Quota", "/runs/x/metrics.jsonl"), ["quota", "metrics.jsonl"]),
        (OSError(errno.EFBIG, "File too large", "/runs/x/a"), ["too large", "/runs/x/a"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
        (MemoryError(), ["out of memory", "MemoryError"]),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ["out of memory"]),
        (
            RuntimeError("Unable to initialize backend 'cpu': std::bad_alloc"),
            ["out of memory", "cpu"],
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "/runs/x/a"),
            ["open files: /runs/x/a", "ulimit"],
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), ["permission", "/runs/x"]),
        (OSError(errno.EROFS, "Read-only file system", "/runs/x"), ["permission", "/runs/x"]),
        (
            ValueError(
                TENSORSTORE.format(
                    code="RESOURCE_EXHAUSTED", words="No space left on device", number=errno.ENOSPC
                )
            ),
            ["No space", "/runs/x/checkpoints/8/state/_sharding"],
        ),
        (
            ValueError(
                TENSORSTORE.format(
                    code="PERMISSION_DENIED", words="Permission denied", number=errno.EACCES
                )
            ),
            ["permission", "/runs/x/checkpoints/8/state/_sharding"],
        ),
        (
            ValueError(
                "UNKNOWN: Gloo all-reduce failed: [tcp] Connection closed by peer [127.0.0.1]:1"
            ),
            ["another process of this run has ended", "Start all of them again"],
        ),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_status_2(error, words):
    ended = run(failing(error))
    assert ended.status == 2 and ended.out == ""
    assert ended.err.startswith("mmjax: error: ") and ended.err.count("\n") == 1
    for word in words:
        assert word.lower() in ended.err.lower()


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("shapes differ"),
        OSError(errno.EIO, "Input/output error", "/runs/x"),
        FileNotFoundError(errno.ENOENT, "No such file", "/runs/x"),
        ValueError(TENSORSTORE.format(code="ABORTED", words="I/O error", number=errno.EIO)),
    ],
)
def test_our_own_mistakes_keep_their_traceback(error):
    assert report(error) is None
    ended = run(failing(error))
    assert ended.status == 1
    assert ended.err.startswith("Traceback") and type(error).__name__ in ended.err


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3)])
def test_a_main_gives_its_exit_status(code, status):
    ended = run(lambda _: code)
    assert (ended.status, ended.err) == (status, "")


def test_nearest_names_the_close_one_or_all():
    assert nearest("lenght", ["length", "width"]) == " Did you mean 'length'?"
    assert nearest("zzz", ["length", "width"]) == " Known: length, width."
    assert nearest("zzz", []) == " Known: none."


FLOOD = (
    "from mmjax.core import errors; errors.run(lambda: [print(i) for i in range({lines})] and 0)"
)


@pytest.mark.parametrize("lines", [3, 100_000])
def test_a_reader_that_has_seen_enough_ends_a_main_in_silence(lines):
    """As in `... | head -1`: whether the main is still printing, or Python at its end."""
    root = Path(__file__).parents[2]
    code = f"input(); {FLOOD.format(lines=lines)}"
    main = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    main.stdout.close()
    main.stdin.write("\n")
    main.stdin.close()
    assert main.stderr.read() == ""
    assert main.wait() == 128 + signal.SIGPIPE


def test_another_pipe_that_broke_is_our_own_mistake():
    ended = run(failing(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert ended.status == 1 and "BrokenPipeError" in ended.err
