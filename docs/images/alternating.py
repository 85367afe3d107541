"""Draw `alternating.png` from the metrics of a run: `python docs/images/alternating.py RUN`.

The upper panel shows which task ran at each of the first steps, the lower one the loss of each task.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

STEPS = 66  # six cycles of eleven steps
SMOOTH = 15  # visits
OUT = Path(__file__).with_suffix(".png")


def read(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def strip(axes: Axes, lines: list[dict], tasks: list[str]) -> None:
    """Draw a row for each task, a cell for each step."""
    picture = np.ones((len(tasks), STEPS, 3))
    for line in lines[:STEPS]:
        row = tasks.index(line["task"])
        picture[row, line["step"]] = to_rgb(f"C{row}")
    axes.imshow(picture, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks([])
    axes.set_title(f"One task per step: the first {STEPS} steps", loc="left", fontsize=10)


def losses(axes: Axes, lines: list[dict], tasks: list[str]) -> None:
    """Draw the loss of each task, a mean over its last visits, as a share of its first one."""
    for row, task in enumerate(tasks):
        of_task = [line for line in lines if line["task"] == task]
        values = np.array([line["loss"] for line in of_task])
        means = np.convolve(values, np.ones(SMOOTH) / SMOOTH, mode="valid")
        steps = [line["step"] for line in of_task][SMOOTH - 1 :]
        axes.plot(steps, means / means[0], color=f"C{row}", label=task)
    axes.set(xlabel="step", ylim=(0, 1.05))
    axes.set_title("Loss of each task, relative to its first visits", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main(run: str) -> None:
    lines = read(Path(run))
    tasks = list(dict.fromkeys(line["task"] for line in sorted(lines, key=lambda x: x["task"])))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 4.4), height_ratios=(1, 1.6), layout="constrained"
    )
    strip(above, lines, tasks)
    losses(below, lines, tasks)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
