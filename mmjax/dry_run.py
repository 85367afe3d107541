"""Describe a run without starting it: `mmjax train --dry_run ...`.

Nothing is compiled, and the workdir is only read: the clock of its newest checkpoint, the identities of its data, and
the step times of what has run there. The data are opened, so that what would stop the run at its start stops this, too:
missing files and fields, and data that have changed. The losses are traced where model FLOPs are needed: for the rule
`budget`, and for tasks whose step time is not measured.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
from etils import epath

from mmjax.core.config import Block
from mmjax.engine import checkpoint
from mmjax.engine.state import Clock
from mmjax.experiment import Experiment, make_experiment
from mmjax.monitor import metrics
from mmjax.monitor.tables import human_flops, human_seconds, percent, table
from mmjax.report.data import newest_meta
from mmjax.schedule.phase_specs import BUDGET, phase_spec_at
from mmjax.schedule.schedule import Schedule, numbers_of
from mmjax.schedule.step_times import Pace, assumed_rate, measured, pace
from mmjax.training.evaluation import open_held_out
from mmjax.training.session import beyond, clock_after, count_examples, fresh_clock

_ROW = 60  # steps of a line of the strip
_ROWS = 5  # lines of it from the first step on
_SEGMENTS = 8  # segments that begin later and get a line each


def dry_run(block: Block, workdir: epath.Path, allow_change: bool) -> None:
    """Print what a run of the config in `workdir` would do.

    Raises:
      UserError: as the run would: a bad config, data that are missing or lack a field, or either where it does not go
        with the run in `workdir`.
    """
    experiment = make_experiment(block)
    step, meta = newest_meta(workdir)
    if meta is None:
        checkpoint.check_may_begin(workdir)
    identities = meta.get("identities", {}) if meta else {}
    examples = count_examples(experiment, workdir, identities)
    open_held_out(experiment)
    clock = clock_after(experiment, step, meta, allow_change) if meta else fresh_clock(experiment)
    steps = experiment.run.steps
    verb = "resume from" if meta else "begin at"
    print(f"Dry run: nothing is compiled or written. A run would {verb} step {clock.step} of {steps}.\n")  # fmt: skip
    _segments_table(experiment, clock.schedule)
    if clock.step >= steps:
        print(f"{beyond(workdir, clock.step, steps)}.")
        return
    print(f"Next steps, {_ROW} per line")
    print("\n".join(strip_lines(clock.schedule, clock.step, steps)) + "\n")
    _tasks_table(experiment, workdir, clock, examples)


def _segments_table(experiment: Experiment, schedule: Schedule) -> None:
    planned, rows = experiment.planned.phase_specs(), []
    ends = [segment.start for segment in schedule.segments[1:]] + [experiment.run.steps]
    for segment, end in zip(schedule.segments, ends, strict=True):
        spec = phase_spec_at(planned, segment.start)
        rule = f"{segment.rule} ({BUDGET})" if spec.rule == BUDGET else segment.rule
        weights = ", ".join(f"{task} {weight}" for task, weight in segment.weights.items())
        rows.append((segment.start, end, planned.index(spec), rule, weights))
    table("Segments", ("from step", "to", "phase", "rule", numbers_of(schedule)), rows)


def strip_lines(schedule: Schedule, start: int, stop: int) -> Iterator[str]:
    """Yield the sequence of steps [start, stop) in letters: its beginning, and where later segments begin.

    First a line for each task with its letter; at most 80 columns.
    """
    letters = letters_of(task for task, n in schedule.between(start, stop).items() if n)
    yield from (f"{letter:>10}  {task}"[:80] for task, letter in letters.items())
    shown = min(start + _ROWS * _ROW, stop)
    later = [s.start for s in schedule.segments if shown <= s.start < stop]
    for first in [*range(start, shown, _ROW), *later[:_SEGMENTS]]:
        tasks = schedule.sequence(first, min(first + _ROW, stop))
        line = "".join(letters[task] for task in tasks)
        groups = (line[i : i + 10] for i in range(0, len(line), 10))
        yield f"{first:>10}  {' '.join(groups)}"
    if len(later) > _SEGMENTS:
        yield f"{'':>10}  and {len(later) - _SEGMENTS} more segments"


def letters_of(tasks: Iterable[str]) -> dict[str, str]:
    """Return a character for each task, one of its name's where that is free; `?` when there are no more."""
    letters: dict[str, str] = {}
    for task in tasks:
        initials = "".join(part[:1] for part in task.lower().split("_"))
        order = initials + task.lower() + string.ascii_letters + string.digits
        free = (
            c for c in order if c not in letters.values() and c in string.printable and c != "_"
        )
        letters[task] = next(free, "?")
    return letters


def _tasks_table(
    experiment: Experiment, workdir: epath.Path, clock: Clock, examples: Mapping[str, int]
) -> None:
    """Print a row for each task, and for each program of it where phases or shapes give it several; then the data.

    `examples` is the number that each task has, which is one epoch.
    """
    steps, phases = experiment.run.steps, experiment.phases
    counts = phases.visits(clock.schedule, clock.step, steps)
    pace = _pace(experiment, workdir, list(counts))
    tasks = {name: task for name, (task, _) in phases.programs.items()}
    read = {name: n * tasks[name].batch for name, n in counts.items()}
    hours = {name: n * pace.seconds[name] / 3600 for name, n in counts.items()}
    total = sum(hours.values())
    rows: list[Sequence[object]] = [
        (
            name,
            n,
            percent(n / (steps - clock.step)),
            read[name],
            human_seconds(pace.seconds[name]) + ("" if name in pace.measured else " ?"),
            f"{hours[name]:.4g} h",
            percent(hours[name] / total),
        )
        for name, n in counts.items()
    ]
    whole = sum(read.values())
    rows.append(("all", steps - clock.step, percent(1.0), whole, "", f"{total:.4g} h", percent(1.0)))  # fmt: skip
    heads = ("task", "steps", "of steps", "examples", "on device", "expected", "of hours")
    table("Tasks", heads, rows)
    _data_table(examples, {name: (tasks[name].name, count) for name, count in read.items()})
    print("\n".join(_remarks(experiment, pace, workdir)))


def _data_table(examples: Mapping[str, int], read: Mapping[str, tuple[str, int]]) -> None:
    """Print what each task has and will read; `read` is task and examples of each program."""
    to_read = Counter[str]()
    for task, count in read.values():
        to_read[task] += count
    rows = [(t, examples[t], n, f"{n / examples[t]:.3g}") for t, n in to_read.items()]
    table("Data", ("task", "examples", "to read", "epochs"), rows)


def _pace(experiment: Experiment, workdir: epath.Path, programs: Sequence[str]) -> Pace:
    lines = [
        {**line, "task": experiment.phases.program(line)}
        for line in metrics.read(workdir)
        if line.get("kind") == "train"
    ]
    known = measured(lines)
    if all(name in known for name in programs):
        return Pace({name: known[name] for name in programs}, tuple(programs), 0.0)
    flops = {name: experiment.flops[name] for name in programs}
    device = jax.devices()[0]
    return pace(flops, known, assumed_rate(device.device_kind, jax.device_count()))


def _remarks(experiment: Experiment, step_times: Pace, workdir: epath.Path) -> Iterator[str]:
    """Yield remarks on the origin of the numbers."""
    if step_times.measured:
        yield f"Step times are those measured in {workdir}."
    if len(step_times.measured) < len(step_times.seconds):
        how = (
            "the rate of the measured tasks" if step_times.measured else "ASSUMED for this machine"
        )
        mark = " (?)" if step_times.measured else ""
        yield f"Step times{mark} follow from model FLOPs at {human_flops(step_times.rate)}FLOP/s, {how}."
    yield "Evaluation, checkpoints, compilation and waiting for data come on top."
    every = experiment.run.schedule.rebalance_every
    if every and any(spec.rule == BUDGET for spec in experiment.planned.phase_specs()):
        yield f"Under {BUDGET}, measured step times set new shares every {every} steps."
