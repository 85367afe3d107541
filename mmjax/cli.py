"""The console command: `mmjax train|evaluate|show|replay|plan|build|tokenizer ...` calls the mains of the modules."""

from __future__ import annotations

import importlib
import sys

from mmjax.core import errors
from mmjax.core.errors import UserError, nearest

COMMANDS = {
    "train": "mmjax.train",
    "evaluate": "mmjax.evaluate",
    "show": "mmjax.show",
    "replay": "mmjax.replay",
    "plan": "mmjax.plan.__main__",
    "build": "mmjax.datasets.build",
    "tokenizer": "mmjax.tokenizer",
}


def main() -> None:
    """Run the command that the first argument names, with the arguments behind it."""
    errors.run(_run)


def _run() -> int | None:
    usage = "usage: mmjax {" + ",".join(COMMANDS) + "} ...  (each takes --help)"
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage)
        return 0
    command = sys.argv[1]
    if command not in COMMANDS:
        raise UserError(f"no command '{command}'.{nearest(command, COMMANDS)} {usage}")
    sys.argv = [f"mmjax {command}", *sys.argv[2:]]
    result: int | None = importlib.import_module(COMMANDS[command]).main()
    return result
