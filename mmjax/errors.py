"""Errors a person can act on, and how the mains report them."""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the person can mend: the message names what, where, and what to do.

    The mains print it as one line and exit with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, else the known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known) or 'none'}."


def report(error: BaseException) -> str | None:
    """One line for errors that are the surroundings' or the person's; None for our own."""
    if isinstance(error, UserError):
        return str(error)
    number, where = _system_error(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{os.strerror(number)}: {where}. Free some space and run again."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"No permission: {where}. Choose another --workdir or mend its owner."
    return None


def _system_error(error: BaseException) -> tuple[int | None, str]:
    """The operating system's number for what went wrong, and the file: of an `OSError`, or out of
    TensorStore's words, which come as a `ValueError` that quotes both."""
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
    except Exception as error:
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


def _leave(code: int) -> None:
    """Exit; at once where a save has failed, since Orbax's threads wait ten minutes for the rest of it."""
    if code and any(type(t).__module__.startswith("orbax.") for t in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
