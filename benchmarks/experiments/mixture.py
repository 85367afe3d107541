"""Results of a mixture of tasks over several seeds, and of each task alone.

    python -m benchmarks.experiments.mixture --config=FILE --out=DIR [--seeds=0,1,2] [--alone] [--config.KEY=VALUE ...]

Each run is a process of `mmjax train` in a folder of its own under DIR; run again, the command resumes
where it was. With `--alone` each task is also trained by itself, for the visits that it has in the mixture,
with the same warm-up as a fraction of its run. At the end DIR/results.md and DIR/results.json hold mean and
spread (the standard deviation over seeds) of every measure.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.core import errors, flags
from mmjax.core.config import Block
from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.schedule.phase_specs import key_of

MIXTURE = "mixture"
# How a value is shown: times what, and with how many digits.
UNITS = {"loss": (1, 3), "fraction": (100, 1), "experts": (1, 1)}
Key = tuple[str, str, str]  # task, split, name of the measure


@dataclass(frozen=True)
class Trial:
    """One run: which seed, all tasks or one, and the overrides that make it of the config."""

    seed: int
    task: str  # MIXTURE, or the only task
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.task}-seed{self.seed}"


def trials(block: Block, seeds: Sequence[int], alone: bool) -> Iterator[Trial]:
    """Yield the runs, the mixtures first."""
    for seed in seeds:
        yield Trial(seed, MIXTURE, (f"seed={seed}",))
    for seed in seeds if alone else ():
        yield from (Trial(seed, task, words) for task, words in singles(block, seed).items())


def singles(block: Block, seed: int) -> dict[str, tuple[str, ...]]:
    """Return, for each task, the overrides that leave it alone with the visits that it has in the mixture."""
    experiment = make_experiment(block)
    steps, warmup = experiment.run.steps, experiment.run.optimizer.warmup
    key, result = key_of(experiment.run.schedule.rule), {}
    for task, visits in experiment.planned.schedule().visits(steps).items():
        words = [f"seed={seed}", f"steps={visits}"]
        words.append(f"optimizer.warmup={round(warmup * visits / steps)}")
        for other in experiment.tasks:
            if other != task:
                words += [f"tasks.{other}.{key}=0", f"tasks.{other}.evaluators={{}}"]
        result[task] = tuple(words)
    return result


def run(trial: Trial, arguments: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Train (or resume), and return the records of `results.json`; what it prints is in a log beside.

    Args:
      trial: the run.
      arguments: of `mmjax train`, the same for all runs.
      out: where its folder lies.
    """
    workdir = out / trial.name
    words = [sys.executable, "-m", "mmjax", "train", f"--workdir={workdir}", *arguments]
    words += [f"--config.{each}" for each in trial.overrides]
    with (out / f"{trial.name}.log").open("a") as log:
        done = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"{trial.name} ended with status {done.returncode}; see {log.name}.")
    records: list[dict[str, Any]] = json.loads((workdir / "results.json").read_text())
    return records


def summarise(found: Mapping[Trial, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return, for each measure, its chance, and the values of the mixture and of the task alone, by seed."""
    rows: dict[Key, dict[str, Any]] = {}
    for trial, records in found.items():
        for record in records:
            if trial.task not in (MIXTURE, record["task"]):
                continue
            key = (record["task"], record["split"], record["name"])
            facts = {"chance": record["chance"], "unit": record.get("unit", "fraction")}
            row = rows.setdefault(key, facts | {"mixture": {}, "alone": {}})
            side = MIXTURE if trial.task == MIXTURE else "alone"
            row[side][trial.seed] = record["value"]
    return [
        dict(zip(("task", "split", "name"), key, strict=True)) | row for key, row in rows.items()
    ]


def shown(values: Mapping[int, float], unit: str) -> str:
    """Return mean and standard deviation over seeds; nothing where there is no run."""
    if not values:
        return "-"
    factor, digits = UNITS[unit]
    mean = statistics.fmean(values.values()) * factor
    spread = statistics.stdev(values.values()) * factor if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def markdown(rows: Sequence[Mapping[str, Any]], command: str) -> str:
    """Return the table, percentages but for losses."""
    tasks: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    seeds = max(len(row["mixture"]) for row in rows)
    lines = [
        f"`{command}`: mean ± standard deviation over {seeds} seeds, in % (losses as they are).",
        "",
        "| task | measure | held out | mixture | alone | chance |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, measures in tasks.items():
        for row in measures:
            unit = row["unit"]
            chance = f"{row['chance']:.3f}" if unit == "loss" else f"{100 * row['chance']:.2g}"
            sides = " | ".join(shown(row[side], unit) for side in ("mixture", "alone"))
            lines.append(f"| {task} | {row['name']} | {row['split']} | {sides} | {chance} |")
    return "\n".join(lines) + "\n"


def seeds_of(words: str) -> list[int]:
    """Return the seeds that `--seeds` names."""
    if not all(seed.strip().isdigit() for seed in words.split(",")):
        raise UserError(f"--seeds={words}: write integers such as 0,1,2.")
    return [int(seed) for seed in words.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser("Train a config over several seeds, and each of its tasks alone.")
    parser.add_argument("--config", required=True, help="path of a config file")
    parser.add_argument("--out", required=True, help="folder of all runs and of the results")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated integers")
    parser.add_argument("--alone", action="store_true", help="train each task alone as well")
    arguments, overrides = flags.parse(parser, argv)
    seeds = seeds_of(arguments.seeds)
    block = flags.read_config(arguments.config, overrides)
    out = Path(flags.make_workdir(arguments.out))
    shared = [f"--config={arguments.config}", *(f"--extra={folder}" for folder in arguments.extra)]
    shared += [f"--config.{each}" for each in overrides]
    found = {}
    for trial in trials(block, seeds, arguments.alone):
        print(f"{trial.name} ...", flush=True)
        found[trial] = run(trial, shared, out)
    rows = summarise(found)
    command = shlex.join(
        ["python", "-m", "benchmarks.experiments.mixture", *(argv or sys.argv[1:])]
    )
    (out / "results.json").write_text(json.dumps(rows, indent=1))
    (out / "results.md").write_text(markdown(rows, command))
    print(f"\n{markdown(rows, command)}\nWritten to {out / 'results.md'}.")
    return 0


if __name__ == "__main__":
    errors.run(main)
