"""Mains in this process: faster than in one of their own, and as strict about what reaches the user."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmjax.core import errors

Main = Callable[[Sequence[str]], int | None]


@dataclass(frozen=True)
class Ended:
    """How a main ended: exit status, standard output and standard error."""

    status: int
    out: str
    err: str


def run(main: Main, *arguments: str) -> Ended:
    """Run a main as `python -m` would; errors that are not the user's come out as they are."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            errors.run(lambda: main(list(arguments)))
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    return Ended(status, out.getvalue(), err.getvalue())


def refused(main: Main, *arguments: str) -> str:
    """The message of a main that ends with status 2 and an error, and prints nothing else there."""
    ended = run(main, *arguments)
    assert ended.status == 2, (ended, arguments)
    assert ended.err.startswith("mmjax: error: ") and ended.err.endswith("\n"), ended.err
    return ended.err.removeprefix("mmjax: error: ").rstrip("\n")
