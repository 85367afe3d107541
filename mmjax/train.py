"""Train a config by alternating gradient descent over its tasks.

    mmjax train --config=CONFIG --workdir=DIR [--config.KEY=VALUE ...]

Run again, it resumes from the newest checkpoint in DIR, or reports that it is done. One process at a time trains in DIR
(see `mmjax.engine.lease`). With --dry_run it prints what it would do: the coming steps, the share of each task, and
the hours that these would take. Exit status: 0 done, 2 an error that its one line explains, 3 stopped by SIGTERM or
SIGINT after saving, 4 ended by its watchdog.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mmjax.core import errors, flags
from mmjax.core.config import Block
from mmjax.core.sharding import describe_replicated, make_mesh, replicated_dims
from mmjax.core.workdir import REPORT
from mmjax.dry_run import dry_run
from mmjax.engine import processes
from mmjax.engine.compile import Program, Request, compile_all, use_cache
from mmjax.engine.health import Diverged
from mmjax.engine.lease import hold
from mmjax.engine.profiling import dump
from mmjax.engine.requests import eval_requests, train_requests
from mmjax.engine.watchdog import Watchdog
from mmjax.evaluators.base import Record, evaluators_of
from mmjax.experiment import Experiment, make_experiment
from mmjax.monitor import summary as tally
from mmjax.monitor.compiling import COMPILED, COMPILING
from mmjax.monitor.goodput import ActivityLog
from mmjax.monitor.null import NullActivities
from mmjax.monitor.tables import program_table, results_table, summary_tables
from mmjax.monitor.wandb import require
from mmjax.report.page import write_report
from mmjax.training.evaluation import Evaluation, announce_changed, read_results
from mmjax.training.initial_state import initial_state
from mmjax.training.loop import Loop
from mmjax.training.origin import started_with
from mmjax.training.session import Session, begin, beyond, roll_back
from mmjax.training.signals import Signals

STOPPED = 3


def train(
    block: Block,
    workdir: epath.PathLike,
    allow_change: bool = False,
    devices: Sequence[jax.Device] | None = None,
    take_over: bool = False,
) -> list[Record] | None:
    """Run the config in `workdir` to its last step.

    To resume a run for twenty more steps of one of its tasks, by a changed copy of its config:

        model = mmjax.load(workdir)
        block = configs.override(model.config, [f"steps={model.step + 20}"])
        block["tasks"] = {"image_text": block["tasks"]["image_text"]}
        train(block, workdir, allow_change=True)

    Args:
      block: the config as plain data; it is not changed.
      workdir: created if missing; resumed if it holds a run.
      allow_change: whether keys of class `schedule` may differ from the saved run's.
      devices: what to run on; all of JAX's if None.
      take_over: whether to take the workdir over at once from a process on another machine whose heartbeat
        may have stopped, instead of watching it for a minute.

    Returns:
      The records of the last evaluation, or None if a signal stopped the run early.

    Raises:
      UserError: a wrong config or data; another process that writes in the workdir.
    """
    use_cache()
    workdir = flags.make_workdir(str(workdir))
    experiment = make_experiment(block)
    if experiment.run.log.wandb:
        require(experiment.run.log.wandb)  # logged before minutes of compiling
    mesh = make_mesh(experiment.run.mesh, devices)
    processes.check_agreement(started_with(experiment, mesh))
    with hold(workdir, "train", take_over) as check_lease:
        return _train(experiment, workdir, mesh, allow_change, check_lease)


def _train(
    experiment: Experiment,
    workdir: epath.Path,
    mesh: Mesh,
    allow_change: bool,
    check_lease: Callable[[], None],
) -> list[Record] | None:
    """Run an experiment in a workdir of which this process holds the lease."""
    with _activity_log(workdir, check_lease) as activities:
        with activities.activity("init"):
            session = begin(experiment, workdir, mesh, allow_change, print, activities.activity)
            session = replace(session, check_lease=check_lease)
        missing = _missing_results(session)
        if session.is_done and not missing:
            records = read_results(workdir) or []
            _report_if_missing(session, activities)
            print(
                f"Done: {beyond(workdir, session.clock.step, experiment.run.steps)}, with its results."
            )
            return records
        if session.is_done:
            print(f"All {experiment.run.steps} steps are done; evaluating {', '.join(missing)}.")
        with activities.activity("init"):
            evaluation = Evaluation(experiment, mesh)
        session = _with_held_out(session, evaluation)
        session.drop_results()
        with activities.activity("compile"):
            programs = _compile(session, {})
        processes.wait_for_all()  # the first collective waits for half a minute only
        return _run(session, programs, evaluation, activities)


def _with_held_out(session: Session, evaluation: Evaluation) -> Session:
    """Return the session that also notes the identities of held-out data; log where these have changed."""
    if session.restored is not None:
        announce_changed(session.restored.meta["identities"], evaluation, print)
    return replace(session, identities={**session.identities, **evaluation.identities})


def _activity_log(workdir: epath.Path, check_lease: Callable[[], None]) -> ActivityLog:
    return ActivityLog(workdir, guard=check_lease) if processes.is_first() else NullActivities()


def _missing_results(session: Session) -> list[str]:
    """Return the evaluators, as `TASK.NAME`, that the results of a finished run lack or had in another form."""
    saved = session.restored.meta["config"] if session.restored else {}
    before = tally.read(session.workdir).get("evaluators", evaluators_of(saved))
    missing = [
        f"{task}.{name}"
        for task, blocks in evaluators_of(session.experiment.block).items()
        for name, block in blocks.items()
        if before.get(task, {}).get(name) != block
    ]
    agreed: list[str] = processes.gather(missing)[0]
    return agreed


def _report_if_missing(session: Session, activities: ActivityLog) -> None:
    """Write the report of a finished run, also of one that was killed between its results and its report."""
    run = session.experiment.run
    if not run.log.report or not processes.is_first() or (session.workdir / REPORT).exists():
        return

    def stuck(text: str) -> None:
        activities.event("stuck", text=text)

    with Watchdog(run.limits.watchdog_seconds, stuck) as watchdog, activities.activity("report"):
        watchdog.at("writing the report")
        write_report(session.workdir)


def _compile(session: Session, there: Mapping[str, Program]) -> dict[str, Program]:
    """Return all programs that the rest of the run needs, including those already `there`."""
    experiment, mesh = session.experiment, session.mesh
    requests = _coming(session) | eval_requests(experiment, mesh)
    missing = {name: request for name, request in requests.items() if name not in there}
    with processes.compiling(missing, "state for checkpoints") as watch:
        programs = {**there, **compile_all(missing, mesh, experiment.run.limits, watch)}
        watch("state for checkpoints", COMPILING)
        session.prepare()
        watch("state for checkpoints", COMPILED)
    if missing:
        program_table([programs[name].report for name in missing])
        _log_replicated(session, [programs[name].report for name in missing])
    if experiment.run.profile.dumps and processes.is_first():
        dump(programs, session.workdir)
    return programs


def _log_replicated(session: Session, reports: Sequence[Mapping[str, Any]]) -> None:
    """Log which dimensions the rules would divide and the mesh does not: parameters, and activations by program."""
    specs = session.experiment.declaration.specs
    dims = {
        name: [str(dimension) for dimension in replicated_dims(spec.axes, spec.shape, session.mesh)]
        for spec in specs.values()
        for name in spec.canonical
    }
    dims |= {f"{r['name']} {r['kind']}": r["whole"] for r in reports}
    lines = describe_replicated(dims)
    if lines:
        print(
            "These stay whole on a mesh axis, whose size does not divide theirs:",
            *lines,
            sep="\n  ",
        )


def _coming(session: Session) -> dict[str, Request]:
    """Return the training programs of the tasks that may run from here on, in this phase or a later one.

    Also of those whose few visits all lie behind: other tasks may be excluded, or shares set again.
    """
    schedule, phases = session.clock.schedule, session.experiment.phases
    needed = {
        variant.program
        for start, stop, phase in phases.pieces(session.clock.step, session.experiment.run.steps)
        for task, variants in phase.variants.items()
        if task in schedule.active(start, stop)
        for variant in variants
    }
    requests = train_requests(session.experiment, session.mesh)
    return {name: request for name, request in requests.items() if name in needed}


def _run(
    session: Session,
    programs: Mapping[str, Program],
    evaluation: Evaluation,
    activities: ActivityLog,
) -> list[Record] | None:
    """Run the loop; a run that diverges rolls back and continues without the task that diverged."""
    with Signals() as signals:
        while True:
            try:
                with (
                    activities.activity("restore"),
                    processes.compiling({}, "state on the devices") as watch,
                ):
                    watch("state on the devices", COMPILING)
                    state = initial_state(session.experiment, session.mesh, session.start)
                    watch("state on the devices", COMPILED)
                records = Loop(session, programs, evaluation, activities, signals).run(state)
                break
            except Diverged as error:
                # Its traceback holds the state, beside which another is about to be made.
                diverged = error.with_traceback(None)
                del state
            activities.event("diverged", text=str(diverged))
            session = roll_back(session, diverged, print, activities.activity)
            session = _with_held_out(session, evaluation)
            with activities.activity("compile"):
                programs = _compile(session, programs)
        if records is not None:
            _report_if_missing(session, activities)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("train", __doc__)
    flags.add_config(parser, required=True)
    flags.add_workdir(parser)
    parser.add_argument(
        "--allow_change",
        action="store_true",
        help="let keys of the schedule differ from the saved run's",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the coming steps and what they would take; write nothing",
    )
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="do not wait for a sign of life of a process on another machine that held the workdir",
    )
    processes.add_arguments(parser)
    arguments, overrides = flags.parse(parser, argv)
    block = flags.read_config(arguments.config, overrides)
    if arguments.dry_run:
        dry_run(block, flags.run_folder(arguments.workdir), arguments.allow_change)
        return 0
    processes.join(arguments)
    workdir = flags.make_workdir(arguments.workdir)
    started = time.monotonic()
    records = train(block, workdir, arguments.allow_change, take_over=arguments.take_over)
    if records is not None:
        results_table(records)
    if processes.is_first() and (summary := tally.read(workdir)):
        summary_tables(summary)
    if records is None:
        return STOPPED
    print(
        f"Finished in {time.monotonic() - started:.0f} s. Results, logs and checkpoints are in {workdir}."
    )
    return 0


if __name__ == "__main__":
    errors.run(main)
