"""Does a system's mechanism help? The same config with it and without it, at equal compute, over several seeds.

    python -m benchmarks.experiments.mechanisms --out=DIR [--only=NAME ...] [--seeds=0,1,2] [--config.KEY=VALUE ...]

NAME is a comparison of `comparisons.py`, or a suite of them: `systems`, or `imp` for the claims of IMP and LIMoE. Each
run is a process of `mmjax train` in a folder of its own under DIR; run again, the command resumes where it was. A
variant whose steps cost more or less is trained for fewer or more of them, by the model FLOPs of the compiled steps, so
that all of a comparison end at the same sum. At the end DIR/results.md, DIR/results.json and DIR/NAME.svg hold what was
measured on held-out data: mean and standard deviation over the seeds, and every seed as a point; and of each part of
the training loss its course, and after which share of its compute the system is where the other one ends.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.comparisons import COMPARISONS, SUITES, Comparison, Variant, chosen
from benchmarks.experiments.mixture import UNITS, Trial, run, seeds_of, shown
from mmjax.core import errors, flags
from mmjax.core.config import Block
from mmjax.core.errors import UserError, nearest
from mmjax.experiment import make_experiment

AXES = {"loss": "nats or error", "fraction": "%", "experts": "experts"}
SPAN = 20  # steps over which a training loss is smoothed


def flops(block: Block) -> int:
    """Return model FLOPs of a whole run."""
    experiment = make_experiment(block)
    steps = experiment.run.steps
    visits = experiment.phases.visits(experiment.planned.schedule(), 0, steps)
    return sum(int(experiment.flops[program]) * count for program, count in visits.items())


def trials(
    comparison: Comparison, seeds: Sequence[int], more: Sequence[str]
) -> tuple[dict[Trial, Variant], dict[str, dict[str, int]]]:
    """Return the runs, seed by seed, and of each variant its steps and the FLOPs of a run."""
    cost: dict[str, dict[str, int]] = {}
    wanted = 0
    for label, variant in comparison.variants.items():
        block = variant.block(more)
        one = flops({**block, "steps": 100})
        wanted = wanted or round(one * block["steps"] / 100)
        steps = round(100 * wanted / one)
        cost[label] = {"steps": steps, "flops": round(one * steps / 100)}
    found = {}
    for seed in seeds:
        for label, variant in comparison.variants.items():
            words = (*variant.overrides, *more, f"seed={seed}", f"steps={cost[label]['steps']}")
            found[Trial(seed, label, words)] = variant
    return found, cost


def summarise(
    comparison: Comparison, found: Mapping[Trial, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return, for each measure, its chance, and the values of each variant by seed."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for trial, records in found.items():
        for record in records:
            name = record["name"]
            if comparison.measures and not name.startswith(comparison.measures):
                continue
            if record["task"] in comparison.without:
                continue
            key = (record["task"], record["split"], name)
            facts = {"chance": record["chance"], "unit": record.get("unit", "fraction")}
            row = rows.setdefault(key, facts | {"values": {}})
            row["values"].setdefault(trial.task, {})[trial.seed] = record["value"]
    return [
        dict(zip(("task", "split", "name"), key, strict=True)) | row for key, row in rows.items()
    ]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Return the mean over the last `SPAN` steps, or over all so far."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    begins = np.maximum(ends - SPAN, 0)
    means: np.ndarray = (sums[ends] - sums[begins]) / (ends - begins)
    return means


def read_steps(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's training steps."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def in_use(steps: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, int]]:
    """Return, for each layer and modality, the experts in use at the end of a run, and how many there are.

    The exponential of the entropy of their shares of tokens, these being means over the last fifth of the steps.
    """
    shares: dict[str, list[list[float]]] = {}
    for step in steps[-max(1, len(steps) // 5) :]:
        for name, value in step.items():
            if name.startswith("usage "):
                shares.setdefault(name.removeprefix("usage "), []).append(value)
    result = {}
    for name, rows in sorted(shares.items()):
        mean = np.asarray(rows).mean(axis=0)
        mean = mean / max(mean.sum(), 1e-9)
        used = mean[mean > 0]
        result[name] = (float(np.exp(-(used * np.log(used)).sum())), len(mean))
    return result


def routing(found: Mapping[Trial, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each layer and modality, as those of `summarise`; by chance, all experts are used alike."""
    rows: dict[str, dict[str, Any]] = {}
    for trial, steps in found.items():
        for name, (value, count) in in_use(steps).items():
            facts = {"task": "", "split": "training", "name": f"experts in use {name}"}
            row = rows.setdefault(
                name, {**facts, "chance": float(count), "unit": "experts", "values": {}}
            )
            row["values"].setdefault(trial.task, {})[trial.seed] = value
    return list(rows.values())


def course(steps: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> dict[str, list[float]]:
    """Return each part of the training loss at every step of a run, smoothed."""
    return {part: smoothed([line[part] for line in steps]).tolist() for part in parts}


def share_to_match(system: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the share of its steps after which the system is where the other one ends; None if it never is."""
    there = np.flatnonzero(np.asarray(system) <= other[-1])
    return float((there[0] + 1) / len(system)) if len(there) else None


def markdown(name: str, made: Mapping[str, Any]) -> str:
    """Return a table of a comparison: percentages, but for losses."""
    labels = list(made["cost"])
    costs = "; ".join(
        f"{label}: {cost['steps']} steps, {cost['flops'] / 1e12:.3g} TFLOP"
        for label, cost in made["cost"].items()
    )
    lines = [
        f"## {name}", "", made["asks"], "", f"Each run, {costs}.", "",
        f"| task | measure | held out | {' | '.join(labels)} | difference | chance |",
        "| --- " * (5 + len(labels)) + "|",
    ]  # fmt: skip
    for row in made["rows"]:
        unit = row["unit"]
        sides = [shown(row["values"].get(label, {}), unit) for label in labels]
        factor, digits = UNITS[unit]
        chance = f"{factor * row['chance']:.{digits}f}"
        cells = [
            row["task"],
            row["name"],
            row["split"],
            *sides,
            _difference(row, labels, unit),
            chance,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(_verdict(made["rows"], labels[0], other) for other in labels[1:])]
    for part, by_seed in made["match"].items():
        lines += ["", _matched(part, labels, by_seed)]
    pictures = [f"![{name}]({name}.svg)"]
    pictures += [f"![courses of {name}]({name}-courses.svg)"] if made["match"] else []
    return "\n".join([*lines, "", *pictures, ""])


def _matched(part: str, labels: Sequence[str], by_seed: Sequence[float | None]) -> str:
    """Return when the first variant is where the second ends, over the seeds in which it is."""
    shares = {seed: share for seed, share in enumerate(by_seed) if share is not None}
    said = f"The {part} loss of training: {labels[0]} is where {labels[1]} ends"
    if not shares:
        return f"{said} in none of {len(by_seed)} seeds."
    seeds = f", in {len(shares)} of {len(by_seed)} seeds" if len(shares) < len(by_seed) else ""
    return f"{said} after {shown(shares, 'fraction')} % of the steps{seeds}."


def _verdict(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> str:
    """Return in how many measures the first variant is ahead, or behind, in every seed."""
    signs = []
    for row in (r for r in rows if r["unit"] != "experts"):
        values, others = (row["values"].get(label, {}) for label in (one, other))
        better = -1 if row["unit"] == "loss" else 1
        signs.append(
            {int(np.sign(better * (values[s] - others[s]))) for s in values if s in others}
        )
    ahead, behind = (sum(sign == {way} for sign in signs) for way in (1, -1))
    return (
        f"{one} against {other}: ahead in every seed in {ahead} of {len(signs)} measures, behind in every seed in "
        f"{behind}; the seeds differ, or are equal, in {len(signs) - ahead - behind}."
    )


def _difference(row: Mapping[str, Any], labels: Sequence[str], unit: str) -> str:
    """Return the differences of the first two variants, seed by seed."""
    one, other = (row["values"].get(label, {}) for label in labels[:2])
    return shown({seed: one[seed] - other[seed] for seed in one if seed in other}, unit)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mmjax"  # the same file for the same results
    from matplotlib import pyplot

    return pyplot


def plot(made: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each measure: every seed a point, the mean a line."""
    pyplot = _pyplot()
    rows, labels = made["rows"], list(made["cost"])
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    figure, panels = pyplot.subplots(
        down, across, figsize=(2.7 * across, 2.5 * down), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(rows) :]:
        panel.axis("off")
    for panel, row in zip(panels.flat, rows, strict=False):
        factor, _ = UNITS[row["unit"]]
        for at, label in enumerate(labels):
            values = [factor * v for v in row["values"].get(label, {}).values()]
            if values:
                panel.plot([at] * len(values), values, "o", color=f"C{at}", alpha=0.7)
                panel.hlines(statistics.fmean(values), at - 0.25, at + 0.25, color=f"C{at}")
        panel.set_xticks(range(len(labels)), labels)
        panel.set_xlim(-0.6, len(labels) - 0.4)
        panel.set_title(f"{row['task']}\n{row['name']}\n{row['split']}", fontsize=8)
        panel.set_ylabel(AXES[row["unit"]], fontsize=8)
        panel.tick_params(labelsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plot_courses(courses: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each part: a line for each run, in the colour of its variant."""
    pyplot = _pyplot()
    parts = list(next(iter(courses.values()))[0])
    figure, panels = pyplot.subplots(
        1, len(parts), figsize=(3.6 * len(parts), 2.8), squeeze=False, layout="constrained"
    )
    for panel, part in zip(panels.flat, parts, strict=True):
        for at, (label, runs) in enumerate(courses.items()):
            for index, run_ in enumerate(runs):
                share = np.linspace(0, 100, len(run_[part]) + 1)[1:]
                panel.plot(share, run_[part], f"C{at}", lw=1, label=label if not index else None)
        panel.set_yscale("log")
        panel.set_title(f"{part}, training, mean of {SPAN} steps", fontsize=8)
        panel.set_xlabel("% of the compute", fontsize=8)
        panel.tick_params(labelsize=7, which="both")
        panel.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser("Train configs with and without their mechanism, over several seeds.")
    parser.add_argument("--out", required=True, help="folder of all runs and of the results")
    parser.add_argument(
        "--only", action="append", default=[], help="a comparison, or a suite; all if not given"
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated integers")
    arguments, overrides = flags.parse(parser, argv)
    for name in arguments.only:
        if name not in (known := [*SUITES, *COMPARISONS]):
            raise UserError(f"--only={name}: no such comparison.{nearest(name, known)}")
    seeds = seeds_of(arguments.seeds)
    out = Path(flags.make_workdir(arguments.out))
    extra = [f"--extra={folder}" for folder in arguments.extra]
    found = {}
    for name in chosen(arguments.only):
        found[name] = compare(name, seeds, out, extra, overrides)
    words = ["python", "-m", "benchmarks.experiments.mechanisms", *(argv or sys.argv[1:])]
    page = f"`{shlex.join(words)}`: mean ± standard deviation over {len(seeds)} seeds, in % (losses as they are).\n"
    page += "\n" + "\n".join(markdown(name, each) for name, each in found.items())
    (out / "results.json").write_text(json.dumps({"command": shlex.join(words), **found}, indent=1))
    (out / "results.md").write_text(page)
    print(f"\n{page}\nWritten to {out / 'results.md'}.")
    return 0


def compare(
    name: str, seeds: Sequence[int], out: Path, extra: Sequence[str], more: Sequence[str]
) -> dict[str, Any]:
    """Train (or resume) all runs of a comparison, and draw what they found."""
    comparison = COMPARISONS[name]
    runs, cost = trials(comparison, seeds, more)
    folder = out / (comparison.folder or name)
    folder.mkdir(exist_ok=True)
    found, steps = {}, {}
    for trial, variant in runs.items():
        print(f"{name}: {trial.name} ...", flush=True)
        found[trial] = run(trial, [f"--config={variant.config}", *extra], folder)
        steps[trial] = read_steps(folder / trial.name)
    rows = summarise(comparison, found) + (routing(steps) if comparison.routed else [])
    result = {"asks": comparison.asks, "cost": cost, "rows": rows, "match": {}}
    plot(result, out / f"{name}.svg")
    if comparison.parts:
        courses = dict[str, Any]()
        for trial in runs:
            courses.setdefault(trial.task, []).append(course(steps[trial], comparison.parts))
        plot_courses(courses, out / f"{name}-courses.svg")
        system, other, *_ = courses.values()
        result["match"] = {
            part: [share_to_match(a[part], b[part]) for a, b in zip(system, other, strict=True)]
            for part in comparison.parts
        }
    return result


if __name__ == "__main__":
    errors.run(main)
