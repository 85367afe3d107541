"""Write the table of speed in `docs/results/speed.md` from the last runs: `python -m benchmarks.readme [--check]`.

Between the two marks of the page are, for each case of `benchmarks/results/`, the quantities of which the project
claims something, and the command. Cases run on an accelerator have a table of their own. With `--check` nothing is
written, and the exit status is 1 if the page is not current.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmjax.core import errors
from mmjax.core.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "results" / "speed.md", ROOT / "benchmarks" / "results"
MARKS = "<!-- benchmarks: made by python -m benchmarks.readme -->", "<!-- end of benchmarks -->"


def results(folder: Path) -> list[Mapping[str, Any]]:
    """Return what the cases found, by name; other files of results are skipped."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [each for each in found if "case" in each and each["quantities"]]


def section(found: Iterable[Mapping[str, Any]]) -> str:
    """Return tables by device, the central processor's first."""
    devices: dict[str, list[Mapping[str, Any]]] = {}
    for each in found:
        devices.setdefault(device(each), []).append(each)
    return "\n".join(_table(name, devices[name]) for name in sorted(devices, key=_rank))


def device(found: Mapping[str, Any]) -> str:
    known = found["environment"]
    kind = str(known["device_kind"])
    return f"{known['processor']}, {known['cores']} cores" if kind == "cpu" else kind


def _rank(name: str) -> tuple[bool, str]:
    return "cores" not in name, name


def _table(name: str, cases: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"On {name}; medians of interleaved pairs, with 95 % intervals:", "",
        "| case | ratio | median | interval | wanted |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for each in cases:
        for q in (q for q in each["quantities"] if q["wanted"]):
            shown = [f"{q[key]:.4g}" for key in ("median", "low", "high")]
            cells = [each["case"], q["name"], shown[0], f"{shown[1]} to {shown[2]}", q["wanted"]]
            lines.append(f"| {' | '.join(cells)} |")
    commands = dict.fromkeys(each["command"] for each in cases)
    return "\n".join([*lines, "", *(f"    {command}" for command in commands), ""])


def replaced(text: str, made: str) -> str:
    """Return a page with another section."""
    between = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    if len(between.findall(text)) != 1:
        raise UserError(
            f"docs/results/speed.md has no section between '{MARKS[0]}' and '{MARKS[1]}'."
        )
    return between.sub(lambda _: f"{MARKS[0]}\n{made}\n{MARKS[1]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description="Write the table of speed in docs/results/speed.md.")
    made.add_argument("--check", action="store_true", help="write nothing; is it up to date?")
    arguments = made.parse_args(argv)
    before = PAGE.read_text()
    after = replaced(before, section(results(RESULTS)))
    if arguments.check:
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    errors.run(main)
