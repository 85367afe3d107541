"""Plan a config for a machine that is not here: memory, traffic and time, by that machine's own compiler.

    mmjax plan --config=CONFIG --topology=v5e:16x16 [--slices=N] [--task=NAME]
        [--json=FILE] [--fast] [--advise] [--config.KEY=VALUE ...]

Nothing is run. Exit status: 0 everything fits, 1 something does not (or did not compile), 2 an error. See `mmjax.plan`
for what it needs and for what `--json` writes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from mmjax.core import errors, flags
from mmjax.core.config import Block
from mmjax.core.errors import UserError, nearest
from mmjax.engine.compile import cache_folder
from mmjax.engine.requests import program_key
from mmjax.experiment import Experiment, make_experiment
from mmjax.plan.advise import advise
from mmjax.plan.case import Specification
from mmjax.plan.report import make_plan
from mmjax.plan.tables import print_advice, print_plan
from mmjax.plan.topology import Topology, read_topology, require_compiler
from mmjax.plan.workers import compile_cases

DOES_NOT_FIT = 1


def plan(
    block: Block,
    topology: Topology,
    *,
    task: str = "",
    is_fast: bool = False,
    seconds: float = 600.0,
    extra: Sequence[str] = (),
    cache: str | None = None,
) -> dict[str, Any]:
    """Return the plan of a config for a topology, as plain data.

    Args:
      block: the config as plain data.
      task: only this task's programs; all if empty.
      is_fast: compile with less optimization: enough to see whether it compiles and how it is sharded.
      seconds: after which a program is given up.
      extra: folders of the user's modules.
      cache: folder of reports; the user's cache if None, none if empty.

    Raises:
      UserError: the config, the task or the mesh does not go with the topology, or a compiler is missing.
    """
    require_compiler(topology)
    experiment = make_experiment(block)
    specification = Specification(
        block, [os.path.abspath(e) for e in extra], topology.kind, topology.shape, topology.slices,
        program_names(experiment, task), is_fast, str(cache_folder("plan")) if cache is None else cache,
    )  # fmt: skip
    return make_plan(experiment, topology, compile_cases(specification, seconds), is_fast)


def program_names(experiment: Experiment, task: str = "") -> list[str]:
    """Return the names of a config's or task's programs: training, then evaluation passes by `program_key`."""
    if task and task not in experiment.tasks:
        raise UserError(f"--task={task}: no such task.{nearest(task, experiment.tasks)}")
    keys = dict.fromkeys(program_key(t, pass_) for t, pass_ in experiment.passes())
    trained = {name: of.name for name, (of, _) in experiment.phases.programs.items()}
    owners = {**trained, **{key: key.split("/")[0] for key in keys}}
    return [name for name, owner in owners.items() if task in ("", owner)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments, overrides = flags.parse(parser, argv)
    if not (arguments.config and arguments.topology):
        raise UserError(f"--config and --topology are needed. {flags.usage(parser)}")
    # Tracing needs a device of its own, and must not take the machine's accelerator for it.
    jax.config.update("jax_platforms", "cpu")
    topology = read_topology(arguments.topology, arguments.slices)
    block = flags.read_config(arguments.config, overrides)
    options: dict[str, Any] = {
        "is_fast": arguments.fast, "seconds": arguments.seconds, "extra": arguments.extra,
    }  # fmt: skip
    if arguments.advise:
        return _advise(block, topology, arguments, options)
    report = plan(block, topology, task=arguments.task, **options)
    report = {"config": arguments.config, "overrides": overrides, **report}
    print_plan(report)
    _write(report, arguments.json)
    return 0 if report["fits"] else DOES_NOT_FIT


def _advise(
    block: Block, topology: Topology, arguments: argparse.Namespace, options: Mapping[str, Any]
) -> int:
    advice = advise(block, arguments.task, lambda b, t: plan(b, topology, task=t, **options))
    print_advice(advice, topology.label)
    _write(advice, arguments.json)
    return 0 if advice["fits"] else DOES_NOT_FIT


def _write(result: Mapping[str, Any], path: str) -> None:
    if path:
        file = epath.Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = flags.command("plan", __doc__)
    flags.add_config(parser)
    parser.add_argument(
        "--topology", default="", metavar="KIND:SHAPE", help="v5e:16x16, v5p:4x4x8, h100:4x8, ..."
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that shape")
    parser.add_argument("--task", default="", metavar="NAME", help="only this task")
    parser.add_argument("--json", default="", metavar="FILE", help="write the plan there too")
    parser.add_argument(
        "--fast", action="store_true", help="compile with less optimization, 3 times as fast"
    )
    parser.add_argument(
        "--advise", action="store_true", help="try micro-batches and rematerialisation"
    )
    parser.add_argument(
        "--seconds", type=float, default=600.0, metavar="S", help="limit for each program"
    )
    return parser


if __name__ == "__main__":
    errors.run(main)
