"""Write golden configs: PYTHONPATH=. python tests/golden/write_configs.py --write

Each file `configs/SYSTEM-SETTING.json` beside this one holds a setting of `configs/` as it is built, with the default
of every key that the config leaves open, so that a default that changes shows in review. Without `--write`, print the
names of the files that are out of date.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
HERE = Path(__file__).resolve().parent
FOLDER = HERE / "configs"
LINE = 100
sys.path[:0] = [str(HERE.parent / "extra")]

from recipes import NAMES, experiment  # noqa: E402
from resolved import complete  # noqa: E402

from mmjax.experiment import Experiment  # noqa: E402


def golden_file(name: str) -> Path:
    """Return the golden file of `SYSTEM:SETTING`."""
    return FOLDER / f"{name.replace(':', '-')}.json"


def content(made: Experiment) -> str:
    """Return what the golden file of an experiment holds."""
    return f"{dumps(complete(made))}\n"


def dumps(value: Any, depth: int = 0) -> str:
    """Return JSON with sorted keys; a block or a list that fits into a line is written on one."""
    line = json.dumps(value, sort_keys=True)
    if len(line) <= LINE - depth or not isinstance(value, dict | list):
        return line
    margin, opened, closed = " " * (depth + 1), *("{}" if isinstance(value, dict) else "[]")
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {dumps(value[key], depth + 1)}" for key in sorted(value)]
    else:
        parts = [dumps(each, depth + 1) for each in value]
    inner = ",\n".join(f"{margin}{part}" for part in parts)
    return f"{opened}\n{inner}\n{margin[1:]}{closed}"


def main(words: list[str]) -> None:
    """Write the golden files, or print the names of those that are out of date."""
    contents = {golden_file(name): content(experiment(name)) for name in NAMES}
    if words == ["--write"]:
        for path in FOLDER.glob("*.json"):
            path.unlink()
        FOLDER.mkdir(exist_ok=True)
        for path, text in contents.items():
            path.write_text(text)
        return
    for path in sorted({*contents, *FOLDER.glob("*.json")}):
        if not path.is_file() or path.read_text() != contents.get(path):
            print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
