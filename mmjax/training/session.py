"""Beginning a run: fresh, or from the newest checkpoint of its workdir, after checking that both agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from etils import epath
from jax.sharding import Mesh

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.files import replace_file
from mmjax.core.parameters import STAT, Arrays
from mmjax.core.teachers import TEACHER
from mmjax.core.workdir import METRICS, REPORT, RESULTS
from mmjax.data import order
from mmjax.engine import checkpoint, processes
from mmjax.engine.checkpoint import Restored
from mmjax.engine.compile import compile_silently
from mmjax.engine.health import Diverged, HealthLimits, quarantine
from mmjax.engine.integrity import Damaged
from mmjax.engine.metadata import AVERAGE_OF
from mmjax.engine.state import (
    BESIDE,
    EMA,
    SUMMED,
    Clock,
    State,
    evaluated,
    parameter_of,
    shardings,
    state_to_canonical,
)
from mmjax.engine.warm_start import (
    check_files,
    grouped,
    pin,
    pin_all,
    pinned,
    pinned_steps,
    sources_of,
)
from mmjax.experiment import Experiment
from mmjax.modalities.base import asset_name
from mmjax.monitor import metrics
from mmjax.nn.towers import TRUNK
from mmjax.optim.views import split_name
from mmjax.run_config import RunConfig
from mmjax.schedule.schedule import Schedule
from mmjax.sources.base import Cached, Examples
from mmjax.training.evaluation import read_results
from mmjax.training.identity import (
    Here,
    check_identities,
    digest,
    identities_of,
)
from mmjax.training.initial_state import (
    Fresh,
    canonical_shapes,
    joined,
    pin_of,
    taken,
    teacher_sources,
)
from mmjax.training.origin import beginning, code_of, environment


@dataclass(frozen=True)
class Session:
    """A run that is about to begin or resume.

    Attributes:
      clock: the position of the run.
      data: the opened source of each task.
      identities: digests of the data, of the files that modalities name, of extension files (`code.KIND/NAME`), and
        what the parameters were taken from.
      start: the checkpoint from which it continues, or the beginning at step 0.
      check_lease: raises if this process may no longer write in the workdir.
    """

    experiment: Experiment
    workdir: epath.Path
    mesh: Mesh
    clock: Clock
    data: Mapping[str, Examples]
    identities: Mapping[str, str]
    start: Restored | Fresh
    check_lease: Callable[[], None] = lambda: None

    @property
    def restored(self) -> Restored | None:
        """The checkpoint from which it continues, if any."""
        return self.start if isinstance(self.start, Restored) else None

    @property
    def is_done(self) -> bool:
        """True if all steps and the complete results of the last evaluation exist."""
        done = self.clock.step >= self.experiment.run.steps
        return done and processes.gather(done and read_results(self.workdir) is not None)[0]

    def drop_results(self) -> None:
        """Remove results and report of an earlier end of the run: they are not those of the steps to come."""
        if processes.is_first():
            if (self.workdir / RESULTS).exists() and read_results(self.workdir) is None:
                print(f"{self.workdir / RESULTS} is damaged; writing it again.")
            (self.workdir / RESULTS).unlink(missing_ok=True)
            (self.workdir / REPORT).unlink(missing_ok=True)

    @property
    def was_evaluated(self) -> bool:
        """True if the run resumed here has evaluated at its last step, perhaps not to the end."""
        if self.restored is None:
            return False
        saved = self.restored.meta["config"]
        every = saved.get("evaluation", {}).get("every", 0)
        step = self.restored.step
        return step == saved["steps"] or bool(every and step and step % every == 0)

    @cached_property
    def _to_canonical(self) -> Callable[[State], Any]:
        specs = self.experiment.declaration.stored
        out = shardings(canonical_shapes(self.experiment, self.mesh))
        abstract = self.experiment.abstract_state(self.mesh)
        return compile_silently(lambda s: state_to_canonical(specs, s), abstract, out, self.mesh)

    def prepare(self) -> None:
        """Compile what saving needs, so that nothing compiles once the run is under way."""
        _ = self._to_canonical

    def canonical(self, state: State) -> Any:
        """Return the state as a checkpoint holds it."""
        return self._to_canonical(state)

    def evaluated(self, state: State) -> Arrays:
        """Return the parameters and buffers that evaluation uses."""
        return evaluated(state)

    def meta(self, clock: Clock) -> dict[str, Any]:
        """Return the data of a checkpoint beside its arrays."""
        return {
            "clock": clock.to_json(),
            "config": self.experiment.block,
            "identities": dict(self.identities),
            "environment": environment(self.mesh),
        }

    def example_ids(self, schedule: Schedule, task: str, step: int) -> tuple[int, list[int]]:
        """Return the examples that a task reads at a step of this session, and the position of the first.

        Args:
          schedule: the one of the step, which the session's own has become since it began.
        """
        phases, clock = self.experiment.phases, self.clock
        read = phases.consumed(schedule, task, clock.step, step)
        position = clock.positions.get(task, 0) + read
        batch, seed = phases.at(step).tasks[task].batch, self.experiment.run.seed
        ids = order.example_ids(seed, task, position, batch, len(self.data[task]))
        return position, [int(i) for i in ids]


def begin(
    experiment: Experiment,
    workdir: epath.Path,
    mesh: Mesh,
    allow_change: bool,
    log: Callable[[str], None],
    activity: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Session:
    """Open the data, find the newest good checkpoint, and determine the position of the run.

    `activity("restore")` is held open while the checkpoint is read.

    Raises:
      UserError: data missing or other than the run's; a config that does not go with the run's.
    """
    data = _open_data(experiment)
    identities = identities_of(experiment, data)
    here = Here(experiment, workdir, mesh, identities)
    restored = _candidate(here, allow_change, log, activity)
    if restored is None:
        clock = fresh_clock(experiment)
    else:
        clock = _clock(experiment, restored)
        changes = _parameter_changes(experiment, restored, allow_change)
        _check_buffers(here, restored, allow_change, log)
        _announce(workdir, restored, log)
        for line in changes:
            log(line)
    start = restored or _fresh(here, allow_change, log)
    if processes.is_first():
        _write_config(workdir, experiment)
        _keep_files(workdir, experiment)
    identities = identities | code_of(experiment) | beginning(workdir, restored)
    return Session(experiment, workdir, mesh, clock, data, identities, start)


def _candidate(
    here: Here,
    allow_change: bool,
    log: Callable[[str], None],
    phase: Callable[[str], AbstractContextManager[Any]],
) -> Restored | None:
    """Return the newest whole checkpoint, if any, with how its config differs; one of another run is refused."""

    def accept(step: int, meta: dict[str, Any]) -> Sequence[configs.Difference]:
        if AVERAGE_OF in meta:
            raise UserError(
                f"Checkpoint {step} in '{here.workdir}' is an average of runs and holds no optimizer state. Begin a "
                f"run with it in another --workdir, by init_from.path={here.workdir}."
            )
        saved, new = meta["config"], here.experiment.block
        differences = configs.check_compatible(saved, new, allow_change, RunConfig)
        here.check(meta, allow_change, log)
        return differences

    abstract, may_be_new = (
        canonical_shapes(here.experiment, here.mesh),
        _may_be_new(here.experiment),
    )
    with phase("restore"):
        return checkpoint.restore_latest(here.workdir, abstract, accept, log, may_be_new)


def _fresh(here: Here, allow_change: bool, log: Callable[[str], None]) -> Fresh:
    """Return the beginning at step 0, with the parameters that `init_from` names."""
    experiment, workdir = here.experiment, here.workdir
    sources, specs = sources_of(experiment.run.init_from), experiment.declaration.read
    steps = pin_all(sources, workdir, log, allow_change)
    teacher_steps = {
        name: pin(source, workdir, log, allow_change, pin_of(name))
        for name, source in teacher_sources(experiment).items()
    }
    parts, teachers = taken(experiment, log, steps, teacher_steps)
    for source, step, values in zip(sources, steps, parts, strict=True):
        check_files(source, step, specs, values, here.identities)
    return joined(parts, teachers)


def _announce(workdir: epath.Path, restored: Restored, log: Callable[[str], None]) -> None:
    """Announce the checkpoint from which the run continues, what it lacks, and how its config differs."""
    log(f"Resuming from step {restored.step} in {workdir}.")
    if not checkpoint.is_verified(restored.meta):
        log(checkpoint.UNVERIFIED.format(step=restored.step))
    _log_gaps(workdir, restored.step, log)
    for change in restored.differences:
        log(f"Config changed: {change}")


def _log_gaps(workdir: epath.Path, step: int, log: Callable[[str], None]) -> None:
    """Log which steps have no line in `metrics.jsonl`.

    They cannot be recovered, and no later step depends on them: an unattended restart continues.
    """
    if not processes.is_first():
        return
    missing = [f"{a}" if a == b else f"{a} to {b}" for a, b in metrics.gaps(workdir, step)]
    if missing:
        others = f" and {len(missing) - 5} more ranges" if len(missing) > 5 else ""
        steps = ", ".join(missing[:5])
        log(f"{workdir / METRICS} lacks the lines of steps {steps}{others}; reports omit them.")


def reopen(
    experiment: Experiment, workdir: epath.Path, mesh: Mesh, step: int | None, schedule: Schedule
) -> Session:
    """Return a run as it stood at the checkpoint of `step` (at its beginning, if None), to look at: nothing is written.

    Args:
      experiment: the config that was in force after `step`.
      step: of a checkpoint in `workdir`.
      schedule: of the run, as known later.

    Raises:
      UserError: data other than the run's.
    """
    data = _open_data(experiment)
    now = identities_of(experiment, data)
    here = Here(experiment, workdir, mesh, now)

    def accept(_: int, meta: dict[str, Any]) -> Sequence[configs.Difference]:
        here.check(meta, True, print)
        return ()

    if step is None:
        clock = replace(fresh_clock(experiment), schedule=schedule)
        steps = pinned_steps(sources_of(experiment.run.init_from), workdir)
        of_teachers = {n: pinned(workdir, pin_of(n)).get("step") for n in experiment.teachers}
        start = joined(*taken(experiment, lambda _: None, steps, of_teachers))
        return Session(experiment, workdir, mesh, clock, data, now, start)
    abstract, may_be_new = canonical_shapes(experiment, mesh), _may_be_new(experiment)
    restored = checkpoint.restore(workdir, step, abstract, accept, may_be_new)
    clock = replace(Clock.from_json(restored.meta["clock"]), schedule=schedule)
    return Session(experiment, workdir, mesh, clock, data, now, restored)


def roll_back(
    session: Session,
    diverged: Diverged,
    log: Callable[[str], None],
    activity: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Session:
    """Return to the newest checkpoint at which all tasks were healthy; from there the diverged one is excluded.

    Later checkpoints are moved to `WORKDIR/diverged`. Killed or stopped before its next checkpoint, the
    run diverges at the same step again, and comes to the same state.

    Raises:
      UserError: no other task is left.
    """
    experiment, workdir = session.experiment, session.workdir
    session.check_lease()
    log(f"{diverged}. Rolling back; limits.divergence = 0 turns this off.")
    good, bounds = newest_good(session, diverged.before), experiment.run.limits.bounds
    for step in processes.gather(checkpoint.steps(workdir))[0]:
        if step == good:
            break
        if processes.is_first() and _was_healthy(workdir, step, bounds) is not None:
            checkpoint.set_aside(workdir, step, "diverged")
    processes.wait_for_all()
    # The config was accepted when the run began, also against an older checkpoint's.
    again = begin(experiment, workdir, session.mesh, True, log, activity)
    now = again.clock.step
    tasks = {
        **dict.fromkeys((*diverged.quarantined, diverged.task), now),
        **again.clock.quarantined,
    }
    schedule = quarantine(again.clock.schedule, tasks, now, now)
    if schedule is None:
        raise UserError(
            f"{diverged}, and no other task is left to continue with. Lower optimizer.learning_rate, or raise "
            "limits.divergence (0: never) if this was no divergence."
        )
    log(f"Continuing from step {now} without {', '.join(sorted(tasks))}.")
    again.prepare()
    clock = replace(again.clock, schedule=schedule, quarantined=tasks)
    return replace(again, clock=clock, check_lease=session.check_lease)


def newest_good(session: Session, before: int | None) -> int | None:
    """Return the newest checkpoint at which all tasks were well, no later than step `before` if that is given."""
    good: int | None = None
    if processes.is_first():
        bounds = session.experiment.run.limits.bounds

        def well(step: int) -> int | None:
            is_early = before is None or step <= before
            return step if is_early and _was_healthy(session.workdir, step, bounds) else None

        good = checkpoint.newest(session.workdir, well)
    agreed: int | None = processes.gather(good)[0]
    return agreed


def _was_healthy(workdir: epath.Path, step: int, bounds: HealthLimits) -> bool | None:
    """Return whether all tasks were well; None for a damaged checkpoint, which `begin` sets aside."""
    try:
        return Clock.from_json(checkpoint.read_meta(workdir, step)["clock"]).is_healthy(bounds)
    except Damaged:
        return None


def _open_data(experiment: Experiment) -> dict[str, Examples]:
    limit = experiment.run.loader.cache_mib * 2**20
    data: dict[str, Examples] = {}
    shared: dict[str, Examples] = {}
    for name, task in experiment.tasks.items():
        key = json.dumps(task.config.source, sort_keys=True)
        if key not in shared:
            shared[key] = Cached(task.source.open(), limit, task.source)
        data[name] = shared[key]
        task.rows().check(data[name], f"tasks.{name}")
    return data


def count_examples(
    experiment: Experiment, workdir: epath.Path, saved: Mapping[str, str]
) -> dict[str, int]:
    """Return the number of examples of each task, whose data are opened and checked as a run does it.

    Raises:
      UserError: data or files that are missing, lack a field, or are not those of the identities `saved`.
    """
    data = _open_data(experiment)
    now = identities_of(experiment, data)
    check_identities(saved, now, workdir)
    return {name: len(examples) for name, examples in data.items()}


def _may_be_new(experiment: Experiment) -> Callable[[str, dict[str, Any]], bool]:
    """Return a test of whether a name may be missing in a checkpoint.

    It is of the head of a task, the stem of a modality or a tower that has been added since, or an average that the run
    did not keep, or the config has changed in what tasks move, and so in what has optimizer state (`_parameter_changes`
    then looks for the parameters).
    """

    def test(name: str, meta: dict[str, Any]) -> bool:
        if name == SUMMED or parameter_of(name).startswith(BESIDE):
            return True  # of buffers, see `_check_buffers`
        changed = _movers(meta["config"]) != _movers(experiment.block)
        is_new_average = name.startswith(EMA) and not meta["config"].get("optimizer", {}).get("ema")
        return changed or is_new_average or _is_new(name, meta)

    return test


def _is_new(name: str, meta: dict[str, Any]) -> bool:
    """Return whether a parameter is of a head, stem or tower that a checkpoint's config does not have."""
    if name.startswith(TEACHER):
        return False
    config = meta["config"]
    parameter = (split_name(name)[1] or parameter_of(name)).removeprefix(STAT)
    part, inner = [*parameter.split("/"), ""][:2]
    if part == "heads":
        return inner not in {(t["objective"].get("head") or n) for n, t in config["tasks"].items()}
    if part == "stems":
        return inner not in config["modalities"]
    return part not in (config["model"].get("towers") or {TRUNK: {}})


def _movers(config: Mapping[str, Any]) -> Any:
    """Return what decides which parameters have optimizer state: rules, views, and what the losses reach."""
    optimizer = config.get("optimizer", {})
    tasks = {
        name: (
            task.get("update_scope") or optimizer.get("update_scope"),
            task["objective"],
            task["inputs"],
        )
        for name, task in config["tasks"].items()
    }
    phases = config.get("schedule", {}).get("phases", ())
    return optimizer.get("rules"), [phase.get("rules") for phase in phases], tasks


def _parameter_changes(experiment: Experiment, restored: Restored, allow_change: bool) -> list[str]:
    """Return a line for the parameters that a checkpoint lacks, and one for those that only it holds.

    Raises:
      UserError: it has such parameters and `allow_change` is False; or it lacks one that is in no new head.
    """
    parameters, step = restored.state["parameters"], restored.step
    specs = experiment.declaration.specs.values()
    new = [name for spec in specs for name in spec.canonical if name not in parameters]
    for name in new:
        if not _is_new(name, restored.meta):
            raise UserError(
                f"Checkpoint {step} holds no parameter '{name}'. Only a new head, stem or tower can be added to a "
                "run: give the objective another 'head', restore the config, or use another --workdir."
            )
    lines = [
        f"Checkpoint {step} {words} ({len(names)}): {', '.join(grouped(names))}."
        for words, names in (
            ("lacks parameters, which are initialised randomly", new),
            ("holds parameters that the config has no longer; later checkpoints lack them", restored.unused),
        )
        if names
    ]  # fmt: skip
    if lines and not allow_change:
        raise UserError(
            f"{' '.join(lines)} Restore the config, add --allow_change to continue so, or use another --workdir."
        )
    return lines


def _beginning_of(name: str) -> str:
    return (
        "starts as its module declares it" if name.startswith(STAT) else "starts as what it copies"
    )


def _check_buffers(
    here: Here, restored: Restored, allow_change: bool, log: Callable[[str], None]
) -> None:
    """Compare buffers and teachers of a checkpoint with those of the model; heads of new tasks bring theirs.

    Raises:
      UserError: one is new or has vanished, and `allow_change` is False; otherwise it is logged.
    """
    saved = checkpoint.read_shapes(here.workdir, restored.step).get("buffers", {})
    before = {name for name in saved if name.startswith(BESIDE)}
    specs = here.experiment.declaration.read
    now = {c for n, s in specs.items() if n.startswith(BESIDE) for c in s.canonical}
    new = [n for n in sorted(now - before) if not _is_new(n, restored.meta)]
    gone = [n for n in sorted(before - now) if not _is_new(n, {"config": here.experiment.block})]
    for name in teacher_sources(here.experiment):
        if any(n.startswith(f"{TEACHER}{name}/") for n in new):
            raise UserError(
                f"model.teachers.{name}.path: checkpoint {restored.step} has no such teacher, and a path is read when "
                "a run first begins. Use another --workdir, with this one as init_from.path."
            )
    changes = [f"has no {group}, which {_beginning_of(group)}" for group in grouped(new)]
    changes += [
        f"holds {group}, which nothing in the config declares now; it is dropped"
        for group in grouped(gone)
    ]
    for change in changes:
        text = f"Checkpoint {restored.step} {change}."
        if not allow_change:
            raise UserError(f"{text} Add --allow_change to accept this, or use another --workdir.")
        log(text)


def clock_after(
    experiment: Experiment, step: int, meta: Mapping[str, Any], allow_change: bool
) -> Clock:
    """Return the clock with which a run of this config would resume from a checkpoint; open and write nothing.

    Raises:
      UserError: the config does not go with the checkpoint's.
    """
    changes = configs.check_compatible(meta["config"], experiment.block, allow_change, RunConfig)
    return _clock(experiment, Restored(step, None, dict(meta), differences=tuple(changes)))


def fresh_clock(experiment: Experiment) -> Clock:
    """Return the clock before step 0."""
    zeros = dict.fromkeys(experiment.tasks, 0)
    return Clock(0, experiment.planned.schedule(), zeros, zeros, zeros)


def _clock(experiment: Experiment, restored: Restored) -> Clock:
    """Return the saved clock; with a new segment from here on where the config's schedule has changed."""
    saved = _released(Clock.from_json(restored.meta["clock"]), restored.differences)
    if not any(_moves_schedule(c, experiment, restored) for c in restored.differences):
        return saved
    planned, now = experiment.planned.schedule(), saved.step
    schedule = saved.schedule
    later = [s for s in planned.segments if s.start > now]
    for start, segment in ((now, planned.segment(now)), *((s.start, s) for s in later)):
        schedule = schedule.append(
            start, segment.weights, rule=segment.rule, seed=segment.seed, now=now
        )
    if saved.quarantined:
        left = quarantine(schedule, saved.quarantined, now, now)
        if left is None:
            raise UserError(
                f"All tasks of the config are in quarantine: {', '.join(saved.quarantined)}. "
                "Fix one (change any key of config.tasks.NAME), or add another."
            )
        schedule = left
    return replace(saved, schedule=schedule)


def _released(saved: Clock, changes: Iterable[configs.Difference]) -> Clock:
    """Return the clock without what it knew of tasks whose blocks have changed: they start again as healthy ones."""
    changed = {
        c.key.split(".")[1] for c in changes if c.kind == "schedule" and c.key.startswith("tasks.")
    }
    return replace(
        saved,
        health={t: h for t, h in saved.health.items() if t not in changed},
        quarantined={t: s for t, s in saved.quarantined.items() if t not in changed},
    )


def _moves_schedule(change: configs.Difference, experiment: Experiment, restored: Restored) -> bool:
    tasks = set(experiment.tasks) ^ set(restored.meta["config"]["tasks"])
    if change.kind == "schedule":  # a task in quarantine whose block has changed is tried again
        tasks |= Clock.from_json(restored.meta["clock"]).quarantined.keys()
    parts = change.key.split(".")
    return parts[0] == "schedule" or (
        parts[0] == "tasks" and (parts[1] in tasks or parts[2] in ("weight", "interval"))
    )


def _write_config(workdir: epath.Path, experiment: Experiment) -> None:
    """Write `config.json` if the run has none, or if it was accepted with changes."""
    text = json.dumps(experiment.block, indent=1, sort_keys=True)
    path = workdir / "config.json"
    if not path.exists() or path.read_text() != text:
        replace_file(path, text)


def _keep_files(workdir: epath.Path, experiment: Experiment) -> None:
    """Copy the files that modalities name to `assets/`, so that the workdir can be loaded by itself.

    A copy that is there already and is the same stays untouched. One that differs is replaced: it is that of a
    run without a checkpoint, since the digests that a checkpoint holds have been compared before.
    """
    for modality in experiment.used.values():
        for name, path in modality.files().items():
            copy, content = workdir / "assets" / asset_name(name), path.read_bytes()
            if not copy.exists() or digest(copy.read_bytes()) != digest(content):
                copy.parent.mkdir(parents=True, exist_ok=True)
                replace_file(copy, content)


def beyond(workdir: epath.Path, step: int, steps: int) -> str:
    """Return a clause about a run that has no step left to do."""
    if step == steps:
        return f"{workdir} holds all {steps} steps"
    return f"{workdir} is at step {step}, beyond steps = {steps}"
