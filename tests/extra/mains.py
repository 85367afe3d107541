"""Mains in this process, or several in another one: faster than a process each, and as strict about the output."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

from mmjax.core import errors

Main = Callable[[Sequence[str]], int | None]


@dataclass(frozen=True)
class Ended:
    """The end of a main: exit status, standard output and standard error."""

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
    """Return the message of a main that ends with status 2 and an error, and prints nothing else there."""
    ended = run(main, *arguments)
    assert ended.status == 2, (ended, arguments)
    assert ended.err.startswith("mmjax: error: ") and ended.err.endswith("\n"), ended.err
    return ended.err.removeprefix("mmjax: error: ").rstrip("\n")


def apart(
    environment: Mapping[str, str], commands: Mapping[str, Sequence[str]]
) -> dict[str, Ended]:
    """Run mains in turn in one process of their own.

    Args:
      environment: of the process.
      commands: the name of a main and its arguments, by a key of the results.
    """
    words = json.dumps(list(commands.values()))
    done = subprocess.run(
        [sys.executable, __file__, words], env=dict(environment), capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    return {key: Ended(*end) for key, end in zip(commands, ends, strict=True)}


def _in_turn(commands: Sequence[Sequence[str]]) -> None:
    """Run mains and print how each ended."""
    mains = [(importlib.import_module(f"mmjax.{name}").main, words) for name, *words in commands]
    print(json.dumps([astuple(run(main, *words)) for main, words in mains]))


if __name__ == "__main__":
    _in_turn(json.loads(sys.argv[1]))
