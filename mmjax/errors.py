"""Errors a person can act on, and how the mains report them."""

from __future__ import annotations

import errno
import sys
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space left on the device: {error.filename or error}. Free some space and run again."
    if isinstance(error, PermissionError):
        return (
            f"No permission: {error.filename or error}. Choose another --workdir or mend its owner."
        )
    return None


def run(main: Callable[[], int | None]) -> None:
    """Run a main; turn a `UserError`, a full disk or a missing permission into one line."""
    try:
        code = main()
    except Exception as error:
        line = report(error)
        if line is None:
            raise
        print(f"mmjax: error: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)
