"""Errors that a user can act on, and their report by the mains."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

_FAILED = (1, 2, 130, 128 + signal.SIGPIPE)
# Messages of collectives and of JAX's coordination service on a process that is gone.
_LOST_PEER = re.compile(r"Gloo .* failed|[Cc]onnection closed by peer|heartbeat timeout")

_NO_MEMORY = re.compile(r"std::bad_alloc|Cannot allocate memory")


class UserError(Exception):
    """An error that the user can fix: the message states what is wrong, where, and what to do.

    The mains print it as one line and exit with status 2.
    """


class RecordError(UserError):
    """The error for one invalid example: a loader makes it an invalid slot, which it counts and names."""


class CodeError(UserError):
    """The error for a mistake in the code of a component, which no other example avoids: it ends the run."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known name closest to `name`, else the known names.

    Example:
      >>> nearest("contrastiv", ["contrastive", "masked_image"])
      " Did you mean 'contrastive'?"
    """
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known) or 'none'}."


def report(error: BaseException) -> str | None:
    """Return one line for errors of the environment or the user; None for internal ones."""
    if isinstance(error, UserError):
        return str(error)
    number, where = _system_error(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{os.strerror(number)}: {where}. Free some space and run again."
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{os.strerror(number)}: {where}. Raise the limit of open files (ulimit -n) and run again."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"Permission denied: {where}. Fix its ownership or choose another --workdir."
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(str(error)):
        first = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        return f"Out of memory on this machine ({first}). Free some, or give the process more, and run again."
    if _LOST_PEER.search(str(error)):
        first = str(error).splitlines()[0][:200]
        return f"Another process of this run has ended ({first}). Start all of them again."
    return None


def _system_error(error: BaseException) -> tuple[int | None, str]:
    """Return the operating system's number for what went wrong, and the file: of an `OSError`, or out of TensorStore's
    words, which come as a `ValueError` that quotes both.
    """
    if isinstance(error, OSError):
        return error.errno, str(error.filename or error)
    words = str(error)
    number = re.search(r"os_error_code='(\d+)'", words)
    files = re.findall(r'"(/[^"]*)"', words)
    return int(number[1]) if number else None, files[0] if files else words


def run(main: Callable[[], int | None]) -> None:
    """Run a main; turn a `UserError`, a full disk or a missing permission into one line."""
    try:
        code = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            _leave_unread()
        line = report(error)
        if line is None:
            traceback.print_exc()
        else:
            print(f"mmjax: error: {line}", file=sys.stderr)
        code = 1 if line is None else 2
    except KeyboardInterrupt:
        print("mmjax: interrupted", file=sys.stderr)
        code = 130
    _leave(code)


def _is_unread(stream: Any) -> bool:
    """Return whether a stream has no reader any longer, for example after `head` has exited."""
    try:
        number = stream.fileno()
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False


def _leave_unread() -> NoReturn:
    """Exit without a word, as a program does that SIGPIPE ends."""
    # Python flushes what is left at its end, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _leave(128 + signal.SIGPIPE)
    raise SystemExit(128 + signal.SIGPIPE)


def _leave(code: int) -> None:
    """Exit; skip cleanup where it would hang.

    After a failed save Orbax's threads wait ten minutes, and JAX waits five for processes that may be gone.
    """
    saving = any(type(t).__module__.startswith("orbax.") for t in threading.enumerate())
    if code in _FAILED and (saving or "jax" in sys.modules and _is_one_of_many()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _is_one_of_many() -> bool:
    from jax._src.distributed import global_state  # kept out of a light import

    return (global_state.num_processes or 1) > 1
