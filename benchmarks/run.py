"""Run benchmarks, and write what they found with the machine, the versions and the command.

    python -m benchmarks.run [--only=NAME ...] [--config=FILE] [--pairs=N] [--out=DIR] [--config.KEY=VALUE ...]

Each case writes DIR/NAME.json and DIR/NAME.md. Let the machine be idle: the load is noted, and printed
where it is high.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

import benchmarks
from benchmarks._pairs import Effort, Quantity
from mmjax.core import errors, flags
from mmjax.core.errors import UserError, nearest
from mmjax.core.sharding import MeshConfig, make_mesh
from mmjax.engine.compile import use_cache
from mmjax.monitor.tables import table
from mmjax.training.origin import environment

COMMANDS = ("run", "readme")


def cases() -> list[str]:
    """Return the names of the cases: modules of this folder, but those with an underscore and commands."""
    found = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.ispkg]
    return sorted(name for name in found if not name.startswith("_") and name not in COMMANDS)


def run_case(name: str, effort: Effort, command: str) -> dict[str, Any]:
    """Return the results of a case, as plain data."""
    module = importlib.import_module(f"benchmarks.{name}")
    began, load = datetime.now(UTC), _load()
    quantities: list[Quantity] = module.measure(effort)
    return {
        "case": name,
        "about": (module.__doc__ or "").splitlines()[0],
        "command": command,
        "began": began.isoformat(timespec="seconds"),
        "pairs": effort.pairs,
        "load": [load, _load()],
        "environment": environment(make_mesh(MeshConfig())),
        "quantities": [dataclasses.asdict(q) for q in quantities],
    }


def markdown(found: dict[str, Any]) -> str:
    """Return a page about what a case found."""
    known = found["environment"]
    rows = [
        f"| {q['name']} | {q['median']:.4g}{' ' + q['unit'] if q['unit'] else ''} "
        f"| {q['low']:.4g} to {q['high']:.4g} | {q['wanted'] or '-'} |"
        for q in found["quantities"]
    ]
    return "\n".join(
        [
            f"# {found['case']}",
            "",
            found["about"],
            "",
            f"| {found['pairs']} interleaved pairs | median | 95 % interval | wanted |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"- Command: `{found['command']}`",
            f"- Began {found['began']}; load before {found['load'][0]:.1f}, after {found['load'][1]:.1f}",
            *(f"- {key}: {value}" for key, value in known.items()),
            "",
        ]
    )


def _load() -> float:
    """Return the number of processes that wanted a core over the last minute; -1 if the system does not report it."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return -1.0


def _chosen(wanted: Sequence[str]) -> list[str]:
    known = cases()
    for name in wanted:
        if name not in known:
            raise UserError(f"--only={name}: no such benchmark.{nearest(name, known)}")
    return list(wanted) or known


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser("Measure ratios of what runs interleaved in one process.")
    parser.add_argument("--only", action="append", default=[], help="a case; all if not given")
    parser.add_argument("--config", default="configs/quickstart.py", help="what is measured")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs")
    parser.add_argument(
        "--steps", type=int, default=1, help="cycles of the schedule in half a pair"
    )
    parser.add_argument("--out", default="benchmarks/results", help="folder for the results")
    arguments, overrides = flags.parse(parser, argv)
    names = _chosen(arguments.only)
    if min(arguments.pairs, arguments.steps) < 1:
        raise UserError("--pairs and --steps must be at least 1.")
    block = flags.read_config(arguments.config, overrides)
    effort = Effort(block, arguments.pairs, arguments.steps, tuple(arguments.extra))
    use_cache()
    if _load() > (os.cpu_count() or 1) / 4:
        print(f"The load is {_load():.1f}: other work will show in what is measured.")
    words = ["python", "-m", "benchmarks.run", *(sys.argv[1:] if argv is None else argv)]
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = run_case(name, effort, shlex.join(words))
        # What an accelerator found stands beside what the processor did.
        platform = jax.default_backend()
        stem = name if platform == "cpu" else f"{name}@{platform}"
        (folder / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / f"{stem}.md").write_text(markdown(found))
        rows = [
            (q["name"], q["unit"], *(f"{q[k]:.4g}" for k in ("median", "low", "high")), q["wanted"])
            for q in found["quantities"]
        ]
        table(name, ("quantity", "unit", "median", "low", "high", "wanted"), rows)
    return 0


if __name__ == "__main__":
    errors.run(main)
