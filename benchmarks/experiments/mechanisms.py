"""Does a system's mechanism help? The same config with it and without it, at equal compute, over several seeds.

    python -m benchmarks.experiments.mechanisms --out=DIR [--only=NAME ...] [--seeds=0,1,2] [--config.KEY=VALUE ...]

Each run is a process of `mmjax.train` in a folder of its own under DIR; run again, the command goes on where it was. A
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.mixture import Trial, run, seeds_of, shown
from mmjax import commandline, errors
from mmjax.config import Block
from mmjax.errors import UserError, nearest
from mmjax.experiment import make_experiment

SPAN = 20  # steps over which a training loss is smoothed


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: a config, with its argument, and overrides."""

    config: str
    overrides: tuple[str, ...] = ()

    def block(self, more: Sequence[str] = ()) -> Block:
        return commandline.read_config(self.config, [*self.overrides, *more])


@dataclass(frozen=True)
class Comparison:
    """Variants by their label: the first is the system, the others lack what is asked about.

    Attributes:
      asks: the question.
      variants: what is compared.
      measures: which records of `results.json` are shown, by the beginnings of their names; all if empty.
      parts: parts of the training loss whose course is shown.
    """

    asks: str
    variants: Mapping[str, Variant]
    measures: tuple[str, ...] = field(default=())
    parts: tuple[str, ...] = field(default=())


def _two(system: str, setting: str, label: str, plain: str) -> dict[str, Variant]:
    path = f"configs/{system}.py:{setting}"
    return {label: Variant(path), plain: Variant(f"{path}-dense")}


def _coca(*overrides: str) -> Variant:
    """A fifth of the recipe's steps."""
    return Variant("configs/coca_small.py", ("steps=250", "checkpoint.every=250", *overrides))


COMPARISONS = {
    "mot_discrete": Comparison(
        "Mixture-of-Transformers against one set of parameters, both modalities by the next token.",
        _two("mot_small", "chameleon", "by modality", "dense"),
        ("held-out loss ",),
        ("text", "colours"),
    ),
    "mot_diffusion": Comparison(
        "Mixture-of-Transformers against one set of parameters, text by the next token and pictures by diffusion.",
        _two("mot_small", "transfusion", "by modality", "dense"),
        ("held-out loss ",),
        ("text", "image"),
    ),
    "mixture_of_mamba": Comparison(
        "Mixture-of-Mamba against Mamba, text by the next token and pictures by diffusion.",
        _two("mixture_of_mamba_small", "transfusion", "by modality", "plain"),
        ("held-out loss ",),
        ("text", "image"),
    ),
    "zorro": Comparison(
        "Zorro's mask against full fusion, with each modality alone and with both.",
        {
            "zorro": Variant("configs/zorro_small.py"),
            "full fusion": Variant("configs/zorro_small.py", ("tasks.sounds.objective.mask=full",)),
        },
    ),
    "coca": Comparison(
        "CoCa's two losses against each alone.",
        {
            "both": _coca(),
            "contrastive": _coca("tasks.captions.objective.caption_weight=0.0"),
            "captioning": _coca("tasks.captions.objective.contrastive_weight=0.0"),
        },
    ),
}


def flops(block: Block) -> int:
    """Model FLOPs of a whole run."""
    experiment = make_experiment(block)
    steps = experiment.run.steps
    return sum(
        int(experiment.flops[task]) * visits
        for task, visits in experiment.schedule().visits(steps).items()
    )


def trials(
    comparison: Comparison, seeds: Sequence[int], more: Sequence[str]
) -> tuple[dict[Trial, Variant], dict[str, dict[str, int]]]:
    """The runs, seed by seed, and of each variant its steps and the FLOPs of a run."""
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
    """For each measure its chance, and the values of each variant by seed."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for trial, records in found.items():
        for record in records:
            name = record["name"]
            if comparison.measures and not name.startswith(comparison.measures):
                continue
            key = (record["task"], record["split"], name)
            facts = {"chance": record["chance"], "unit": record.get("unit", "fraction")}
            row = rows.setdefault(key, facts | {"values": {}})
            row["values"].setdefault(trial.task, {})[trial.seed] = record["value"]
    return [
        dict(zip(("task", "split", "name"), key, strict=True)) | row for key, row in rows.items()
    ]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean over the last `SPAN` steps, or over all so far."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    begins = np.maximum(ends - SPAN, 0)
    means: np.ndarray = (sums[ends] - sums[begins]) / (ends - begins)
    return means


def course(workdir: Path, parts: Sequence[str]) -> dict[str, list[float]]:
    """Each part of the training loss at every step of a run, smoothed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    return {part: smoothed([line[part] for line in steps]).tolist() for part in parts}


def share_to_match(system: Sequence[float], other: Sequence[float]) -> float | None:
    """The share of its steps after which the system is where the other one ends; None if it never is."""
    there = np.flatnonzero(np.asarray(system) <= other[-1])
    return float((there[0] + 1) / len(system)) if len(there) else None


def markdown(name: str, made: Mapping[str, Any]) -> str:
    """A table of a comparison: percentages, but for losses."""
    labels = list(made["cost"])
    costs = "; ".join(
        f"{label}: {cost['steps']} steps, {cost['flops'] / 1e12:.3g} TFLOP"
        for label, cost in made["cost"].items()
    )
    lines = [
        f"## {name}", "", made["asks"], "", f"Each run, {costs}.", "",
        f"| measure | held out | {' | '.join(labels)} | difference | chance |",
        "| --- " * (4 + len(labels)) + "|",
    ]  # fmt: skip
    for row in made["rows"]:
        unit = row["unit"]
        sides = [shown(row["values"].get(label, {}), unit) for label in labels]
        chance = f"{row['chance']:.3f}" if unit == "loss" else f"{100 * row['chance']:.2g}"
        cells = [row["name"], row["split"], *sides, _difference(row, labels, unit), chance]
        lines.append(f"| {' | '.join(cells)} |")
    for part, by_seed in made["match"].items():
        lines += ["", _matched(part, labels, by_seed)]
    pictures = [f"![{name}]({name}.svg)"]
    pictures += [f"![courses of {name}]({name}-courses.svg)"] if made["match"] else []
    return "\n".join([*lines, "", *pictures, ""])


def _matched(part: str, labels: Sequence[str], by_seed: Sequence[float | None]) -> str:
    """When the first variant is where the second ends, over the seeds in which it is."""
    shares = {seed: share for seed, share in enumerate(by_seed) if share is not None}
    said = f"The {part} loss of training: {labels[0]} is where {labels[1]} ends"
    if not shares:
        return f"{said} in none of {len(by_seed)} seeds."
    seeds = f", in {len(shares)} of {len(by_seed)} seeds" if len(shares) < len(by_seed) else ""
    return f"{said} after {shown(shares, 'fraction')} % of the steps{seeds}."


def _difference(row: Mapping[str, Any], labels: Sequence[str], unit: str) -> str:
    """Of the first two variants, seed by seed."""
    one, other = (row["values"].get(label, {}) for label in labels[:2])
    return shown({seed: one[seed] - other[seed] for seed in one if seed in other}, unit)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mmjax"  # the same file for the same results
    from matplotlib import pyplot

    return pyplot


def plot(made: Mapping[str, Any], path: Path) -> None:
    """A panel for each measure: every seed a point, the mean a line."""
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
        factor = 1 if row["unit"] == "loss" else 100
        for at, label in enumerate(labels):
            values = [factor * v for v in row["values"].get(label, {}).values()]
            if values:
                panel.plot([at] * len(values), values, "o", color=f"C{at}", alpha=0.7)
                panel.hlines(statistics.fmean(values), at - 0.25, at + 0.25, color=f"C{at}")
        panel.set_xticks(range(len(labels)), labels)
        panel.set_xlim(-0.6, len(labels) - 0.4)
        panel.set_title(f"{row['name']}\n{row['split']}", fontsize=8)
        panel.set_ylabel("nats or error" if row["unit"] == "loss" else "%", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plot_courses(courses: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel for each part: a line for each run, in the colour of its variant."""
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
    made = commandline.parser("Train configs with and without their mechanism, over several seeds.")
    made.add_argument("--out", required=True, help="folder of all runs and of the results")
    made.add_argument("--only", action="append", default=[], help="a comparison; all if not given")
    made.add_argument("--seeds", default="0,1,2", help="comma-separated integers")
    arguments, overrides = commandline.parse(made, argv)
    for name in arguments.only:
        if name not in COMPARISONS:
            raise UserError(f"--only={name}: no such comparison.{nearest(name, COMPARISONS)}")
    seeds = seeds_of(arguments.seeds)
    out = Path(commandline.make_workdir(arguments.out))
    extra = [f"--extra={folder}" for folder in arguments.extra]
    found = {}
    for name in arguments.only or COMPARISONS:
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
    """Train (or go on with) all runs of a comparison, and draw what they found."""
    comparison = COMPARISONS[name]
    runs, cost = trials(comparison, seeds, more)
    folder = out / name
    folder.mkdir(exist_ok=True)
    found, courses = {}, dict[str, Any]()
    for trial, variant in runs.items():
        print(f"{name}: {trial.name} ...", flush=True)
        found[trial] = run(trial, [f"--config={variant.config}", *extra], folder)
        courses.setdefault(trial.task, []).append(course(folder / trial.name, comparison.parts))
    made = {"asks": comparison.asks, "cost": cost, "rows": summarise(comparison, found)}
    plot(made, out / f"{name}.svg")
    if comparison.parts:
        plot_courses(courses, out / f"{name}-courses.svg")
    system, other, *_ = courses.values()
    made["match"] = {
        part: [share_to_match(a[part], b[part]) for a, b in zip(system, other, strict=True)]
        for part in comparison.parts
    }
    return made


if __name__ == "__main__":
    errors.run(main)
