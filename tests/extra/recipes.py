"""The shipped configs, as tests read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from mmjax.core import config as configs
from mmjax.experiment import Experiment, make_experiment

ROOT = Path(__file__).parents[2]


def block(name: str, argument: str = "") -> configs.Block:
    """The config as plain data."""
    path = ROOT / "configs" / f"{name}.py"
    return configs.read_file(f"{path}:{argument}" if argument else str(path))


def experiment(name: str, argument: str = "") -> Experiment:
    return make_experiment(block(name, argument))


def without_sizes(block: Any) -> Any:
    """The config without its numbers, its tokenizer, and what the hardware decides."""
    if isinstance(block, dict):
        left_out = ("remat", "compute", "tokenizer")
        return {k: without_sizes(v) for k, v in block.items() if k not in left_out}
    if isinstance(block, list | tuple):
        return [without_sizes(each) for each in block]
    return 0 if isinstance(block, int | float) and not isinstance(block, bool) else block


def abstract(made: Experiment, task: str) -> tuple[dict[str, Any], Any]:
    """Shapes of all parameters, and of a batch of the task."""
    parameters = {
        n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in made.declaration.specs.items()
    }
    rows, shapes = made.tasks[task].batch, made.tasks[task].rows().shapes()
    return parameters, jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype), shapes
    )
