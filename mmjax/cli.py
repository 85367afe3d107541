"""The console command: `mmjax COMMAND ...`, or `python -m mmjax COMMAND ...`, calls the mains of the modules."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import platform
import sys
from pathlib import Path

from mmjax import __version__
from mmjax.core import errors
from mmjax.core.errors import UserError, nearest

COMMANDS = {
    "train": "mmjax.train",
    "evaluate": "mmjax.evaluate",
    "average": "mmjax.average",
    "describe": "mmjax.describe",
    "show": "mmjax.show",
    "plan": "mmjax.plan.__main__",
    "replay": "mmjax.replay",
    "build": "mmjax.datasets.build",
    "convert": "mmjax.convert.convert",
    "report": "mmjax.report.page",
    "tokenizer": "mmjax.tokenizer",
}


def main() -> None:
    """Run the command that the first argument names, with the arguments after it."""
    errors.run(_run)


def _run() -> int | None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(overview())
        return 0
    if sys.argv[1] == "--version":
        print(f"mmjax {__version__}, Python {platform.python_version()}, {platform.platform()}")
        return 0
    command = sys.argv[1]
    if command not in COMMANDS:
        raise UserError(
            f"No command '{command}'.{nearest(command, COMMANDS)} `mmjax --help` lists all."
        )
    sys.argv = [f"mmjax {command}", *sys.argv[2:]]
    result: int | None = importlib.import_module(COMMANDS[command]).main()
    return result


def overview() -> str:
    """Return the usage, and a line for each command: the first of its module's docstring."""
    lines = [f"  {command:<11}{summary(module)}" for command, module in COMMANDS.items()]
    return "\n".join([
        "usage: mmjax COMMAND ...", "", *lines, "",
        "`mmjax COMMAND --help` prints the arguments of one, `mmjax --version` the version.",
    ])  # fmt: skip


def summary(module: str) -> str:
    """Return the first line of a module's docstring without importing it, and so without JAX."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return (doc or "").split("\n")[0]
