"""Tasks that alternate against each task alone: what switching costs, and the host's time per step.

In each pair, one period of the schedule is timed, and each task alone; the ratio is the time of the
period to the same steps at the speed that each task has alone. Batches are held in memory. Which half
comes first alternates. The times are from the end of one step to the end of a later one.
"""

from __future__ import annotations

import statistics
from collections import Counter

from benchmarks._pairs import Effort, Quantity, quantity
from benchmarks._steps import Steps


def measure(effort: Effort) -> list[Quantity]:
    """Return the ratio, and milliseconds of the host per step."""
    steps = Steps(effort.block)
    length = effort.steps * steps.period
    order = steps.order(0, length)
    held = {order[batch.step]: batch for batch in steps.batches(0, length)}
    counts = Counter(order)

    def alternating() -> tuple[float, float]:
        timed = steps.run([(task, held[task]) for task in [order[-1], *order]], untimed=1)
        return timed.seconds, statistics.median(timed.host)

    def alone() -> float:
        rows = {task: [(task, held[task])] * (count + 1) for task, count in counts.items()}
        return sum(steps.run(each, untimed=1).seconds for each in rows.values())

    alone()  # the first run of a program is slower
    ratios, host = [], []
    for pair in range(effort.pairs):
        if pair % 2:
            apart, (together, busy) = alone(), alternating()
        else:
            (together, busy), apart = alternating(), alone()
        ratios.append(together / apart)
        host.append(1000 * busy)
    tasks = ", ".join(f"{task} {count}" for task, count in counts.items())
    return [
        quantity(f"alternating ({tasks}) to each alone", ratios, wanted="at most 1.02"),
        quantity("host per step", host, unit="ms"),
    ]
