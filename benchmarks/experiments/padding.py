"""The share of positions that hold no token, of the sequences that a config's tasks train on.

    python -m benchmarks.experiments.padding --config=configs/transfusion.py:small
    python -m benchmarks.experiments.padding --config=configs/transfusion.py:7b --tokens=25

counts the tokens of training batches, with texts in slots of their own ("slots", the longest text in each) and as the
config has them. Texts are those of the task's source; with `--tokens` they have lengths drawn from a log-normal
distribution of that mean (the end among them), whose deviation is 0.4 of it. Pictures are blank: they have no padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mmjax.core import config as configs
from mmjax.core import errors, flags
from mmjax.engine.loader import arranged_rows
from mmjax.experiment import Experiment, make_experiment
from mmjax.model import Model
from mmjax.monitor.tables import percent, table
from mmjax.objectives.transfusion import Transfusion
from mmjax.sources.base import Example
from mmjax.task import RowSpec, Task

SPREAD = 0.4  # deviation of the logarithm of simulated lengths


@dataclass(frozen=True)
class Padding:
    """The padding of a task's sequences.

    Attributes:
      slots: the share of padding with a slot for the longest text in each item.
      share: the share of padding as the config has it.
      cut: the share of the texts' tokens that found no place.
    """

    slots: float
    share: float
    cut: float


@dataclass(frozen=True)
class Blank(RowSpec):
    """Rows that hold texts alone: those of the example, or of lengths drawn around `tokens`."""

    tokens: int = 0

    def make(self, example: Example, rng: np.random.Generator | None) -> Any:
        row = self.blank()
        for name, arrays in row.inputs.items():
            if not hasattr(self.inputs[name].modality, "words"):
                if "valid" in arrays:
                    arrays["valid"][:] = True
            elif self.tokens:
                assert rng is not None
                mean = math.log(self.tokens) - SPREAD**2 / 2
                length = max(2, round(rng.lognormal(mean, SPREAD)))
                arrays["valid"][:] = np.arange(len(arrays["valid"])) < length
            else:
                row.inputs[name] = self.inputs[name].preprocess(example, rng)
        return replace(row, valid=np.True_)


@dataclass(frozen=True)
class _Texts(Task):
    tokens: int = 0

    def rows(self) -> RowSpec:
        return Blank(self.inputs, (), tokens=self.tokens)


class _Nothing:
    """Examples that are not read."""

    description, fields = "simulated texts", ()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Example:
        return {}


def measure(block: configs.Block, tokens: int = 0, rows: int = 4096) -> dict[str, Padding]:
    """Return the padding of each task with a Transfusion objective, over about so many rows."""
    experiment = make_experiment(_narrow(block))
    model = experiment.declaration.merge(experiment.declaration.initialise(0))
    return {
        name: _measured(experiment, model, task, tokens, rows)
        for name, task in experiment.tasks.items()
        if isinstance(task.objective, Transfusion)
    }


def _narrow(block: configs.Block) -> configs.Block:
    """Return the config with a model of no size: which tokens there are does not depend on it."""
    layer = {"name": "transformer", "num_heads": 1, "mlp_dim": 8}
    model = {"width": 16, "layers": [{"repeat": 1, "blocks": [layer]}]}
    tasks = {}
    for name, task in block["tasks"].items():
        objective = {**task["objective"]}
        objective |= {"unet_channels": 0} if "unet_channels" in objective else {}
        tasks[name] = {**task, "objective": objective, "evaluators": {}}
    return {**block, "model": model, "tasks": tasks, "mesh": {"data": 1}}


def _measured(made: Experiment, model: Model, task: Task, tokens: int, rows: int) -> Padding:
    objective: Any = task.objective
    roomy = dict.fromkeys(objective.capacity, 2**31 - 1)
    ways = {
        "slots": replace(objective, capacity={}, window=0),
        "config": objective,
        "uncut": replace(objective, capacity=roomy),
    }
    texts = _Texts(task.name, task.config, task.inputs, objective, task.source, tokens)
    examples: Any = _Nothing() if tokens else task.source.open()
    size = math.lcm(objective.pack, objective.window_rows(task.batch))
    size *= max(1, min(rows, task.batch) // size)
    valid, positions, told = Counter[str](), Counter[str](), 0
    call = jax.jit(lambda way, batch, key: ways[way].occupancy(model, batch, key), static_argnums=0)
    for start in range(0, rows, size):
        batch, _ = arranged_rows(texts, examples, made.run.seed, start, (0, size))
        key = jax.random.fold_in(task.fold(made.run.seed), start)
        told += sum(int(batch.inputs[m]["valid"].sum()) for m in objective.capacity)
        for way in ways:
            found = call(way, batch, key)
            valid[way] += int(found.valid)
            positions[way] += found.positions
    share = {way: 1 - valid[way] / positions[way] for way in ways}
    cut = (valid["uncut"] - valid["config"]) / told if told else 0.0
    return Padding(share["slots"], share["config"], cut)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a config file, or FILE:ARGUMENT")
    parser.add_argument("--tokens", type=int, default=0, help="mean length of simulated texts")
    parser.add_argument("--rows", type=int, default=4096, help="rows of each task to count, about")
    arguments, overrides = flags.parse(parser, argv)
    block = configs.override(configs.read_file(arguments.config), overrides)
    rows = [
        (name, percent(each.slots), percent(each.share), percent(each.cut))
        for name, each in measure(block, arguments.tokens, arguments.rows).items()
    ]
    table(f"Padding of {arguments.config}", ("task", "slots", "config", "cut tokens"), rows)
    return 0


if __name__ == "__main__":
    errors.run(main)
