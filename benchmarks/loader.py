"""Examples per second with the real loader against the same steps on batches held in memory.

In each pair the same steps are timed twice: from a loader that has run for a while and keeps reading
ahead, and from a list. Which half comes first alternates; each pair takes later steps of the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks._pairs import Effort, Quantity, quantity
from benchmarks._steps import Steps
from mmjax.engine.loader import HostBatch


def measure(effort: Effort) -> list[Quantity]:
    """Return the ratio, and the examples per second of both."""
    steps = Steps(effort.block)
    ahead = steps.experiment.run.loader.prefetch
    untimed = ahead + 2  # what was read ahead before the first step is used up
    timed = effort.steps * steps.period
    length = untimed + timed
    sizes = {name: task.batch for name, task in steps.experiment.tasks.items()}

    def examples_per_second(start: int, batches: Iterable[HostBatch]) -> float:
        order = steps.order(start, start + length)
        seconds = steps.run(zip(order, batches, strict=False), untimed).seconds
        return sum(sizes[task] for task in order[untimed:]) / seconds

    def real(start: int) -> float:
        with steps.loader(start, start + length + ahead) as loader:
            return examples_per_second(start, loader)

    def held(start: int) -> float:
        return examples_per_second(start, steps.batches(start, start + length))

    real(0)  # the first run of a program is slower, and fills the cache of examples
    found: list[tuple[float, float]] = []
    for pair in range(effort.pairs):
        start = pair * timed
        if pair % 2:
            memory, loaded = held(start), real(start)
        else:
            loaded, memory = real(start), held(start)
        found.append((loaded, memory))
    return [
        quantity("real loader to memory", [a / b for a, b in found], wanted="at least 0.9"),
        quantity("real loader", [a for a, _ in found], unit="examples/s"),
        quantity("memory", [b for _, b in found], unit="examples/s"),
    ]
