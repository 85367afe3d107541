"""Search for the rematerialisation and micro-batches that make every task fit at the lowest estimated time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mmjax.core.config import Block
from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.model import towers_in

REMATS = ("none", "dots", "full")
_MOST = 32  # micro-batches
_ALIKE = (
    1.05  # times of estimates that differ by less are alike; the choice nearest to `none` is taken
)
Plan = Callable[[Block, str], Mapping[str, Any]]


def advise(block: Block, task: str, plan: Plan) -> dict[str, Any]:
    """Try choices for each task against the compiler.

    `remat` of every tower holds for all tasks, `microbatches` for each. For each remat, a task gets the fewest
    micro-batches with which its training fits; then the remat counts with which most tasks fit, and of those
    the one with the least time of the whole schedule.

    Args:
      task: only this one; all if empty.
      plan: `(config, task) -> plan` of one task's programs.

    Returns:
      `{"version", "tried": [{task, remat, microbatches, needed, fits, seconds, chosen}], "overrides":
      ["key=value"], "fits", "without": tasks that nothing made fit}`.
    """
    experiment = make_experiment(block)
    tasks = [task] if task else list(experiment.tasks)
    visits = experiment.planned.schedule().visits(experiment.run.steps)
    tried = [
        choice for remat in REMATS for name in tasks for choice in _climb(block, name, remat, plan)
    ]
    prices = {remat: _price(tried, remat, tasks, visits) for remat in REMATS}
    fewest, least = min(prices.values())
    # An estimate is not so fine that a few percent were worth a change.
    best = next(r for r, (n, s) in prices.items() if n == fewest and s <= _ALIKE * least)
    for choice in tried:
        choice["chosen"] = choice["remat"] == best and choice["fits"]
    chosen = {choice["task"]: choice for choice in tried if choice["chosen"]}
    without = [name for name in tasks if name not in chosen]
    return {
        "version": 1,
        "tried": sorted(tried, key=lambda choice: tasks.index(choice["task"])),
        "overrides": list(_overrides(block, best, chosen)) if chosen else [],
        "fits": not without,
        "without": without,
    }


def _climb(block: Block, task: str, remat: str, plan: Plan) -> Iterable[dict[str, Any]]:
    """Yield the task's programs with more and more micro-batches, until one fits."""
    batch, start = block["tasks"][task]["batch"], block["tasks"][task].get("microbatches", 1)
    for parts in _parts(batch, start):
        try:
            report = plan(changed(block, task, remat, parts), task)
        except UserError:
            if parts == start:
                raise
            return  # a part no longer divides over the mesh
        choice = {"task": task, "remat": remat, "microbatches": parts, **_training(report)}
        yield choice
        if choice["fits"]:
            return


def _training(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the needs of a task's training, whether it fits and how long a step takes: of its largest program."""
    programs = [p for p in plan["programs"] if p["kind"] == "train"]
    needed = [p["bytes"]["needed"] for p in programs if "bytes" in p]
    seconds = [p["estimate"]["seconds"] for p in programs if "estimate" in p]
    return {
        "needed": max(needed, default=None),
        "fits": all(p["fits"] for p in programs),
        "seconds": max(seconds, default=None),
    }


def _parts(batch: int, start: int) -> list[int]:
    return [
        start * 2**i for i in range(12) if start * 2**i <= _MOST and batch % (start * 2**i) == 0
    ]


def changed(block: Block, task: str, remat: str, microbatches: int) -> Block:
    """Return a copy of the config with these choices."""
    result = copy.deepcopy(block)
    for tower in towers_in(result).values():
        tower["remat"] = remat
    result["tasks"][task]["microbatches"] = microbatches
    return result


def _price(
    tried: Sequence[Mapping[str, Any]], remat: str, tasks: Sequence[str], visits: Mapping[str, int]
) -> tuple[int, float]:
    """Return how many tasks do not fit, and the seconds of the others' visits."""
    fitting = [choice for choice in tried if choice["remat"] == remat and choice["fits"]]
    seconds = sum(choice["seconds"] * max(1, visits.get(choice["task"], 0)) for choice in fitting)
    return len(tasks) - len(fitting), seconds


def _overrides(block: Block, remat: str, chosen: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Yield the keys that differ from the config."""
    for where, tower in towers_in(block).items():
        if tower.get("remat", "none") != remat:
            yield f"{where}.remat={remat}"
    for task, choice in chosen.items():
        if block["tasks"][task].get("microbatches", 1) != choice["microbatches"]:
            yield f"tasks.{task}.microbatches={choice['microbatches']}"
