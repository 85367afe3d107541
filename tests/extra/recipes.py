"""The shipped configs, as tests read them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax

from mmjax.core import config as configs
from mmjax.core import settings
from mmjax.experiment import Experiment, make_experiment

ROOT = Path(__file__).parents[2]


FILES = sorted((ROOT / "configs").glob("*.py"))


def names_of(file: Path) -> list[str]:
    """Return the names `SYSTEM:SETTING` of all settings of a config file; its default is `SYSTEM` alone."""
    setting = settings.setting_type(configs.load_module(file).get_config)
    assert setting is not None, f"{file} has no settings"
    words = settings.table(setting, str(file))
    return [f"{file.stem}:{word}" if word else file.stem for word in words]


NAMES = tuple(name for file in FILES for name in names_of(file))


def block(name: str) -> configs.Block:
    """Return the config of `SYSTEM:SETTING` as plain data."""
    file, colon, setting = name.partition(":")
    return configs.read_file(f"{ROOT / 'configs' / file}.py{colon}{setting}")


@cache
def experiment(name: str) -> Experiment:
    """Return the experiment of `SYSTEM:SETTING`, built once for all tests; do not change it."""
    return make_experiment(block(name))


def without_sizes(block: Any) -> Any:
    """Return the config without its numbers, its tokenizer, and what the hardware decides."""
    if isinstance(block, dict):
        left_out = ("remat", "compute", "tokenizer")
        return {k: without_sizes(v) for k, v in block.items() if k not in left_out}
    if isinstance(block, list | tuple):
        return [without_sizes(each) for each in block]
    return 0 if isinstance(block, int | float) and not isinstance(block, bool) else block


def abstract(made: Experiment, task: str) -> tuple[dict[str, Any], Any]:
    """Return shapes of all parameters, and of a batch of the task."""
    parameters = {
        n: jax.ShapeDtypeStruct(s.shape, "float32") for n, s in made.declaration.specs.items()
    }
    rows, shapes = made.tasks[task].batch, made.tasks[task].rows().shapes()
    return parameters, jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((rows, *s.shape), s.dtype), shapes
    )
