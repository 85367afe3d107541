"""The whole config: its defaults, its bounds, and what a change of each key means."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.run_config import (
    DtypeConfig,
    EvaluationConfig,
    LogConfig,
    RunConfig,
)
from mmjax.schedule.config import ScheduleConfig

LEAST: dict[str, Any] = {
    "steps": 3,
    "modalities": {"image": {"name": "image"}},
    "model": {"width": 8, "layers": [{"repeat": 1, "blocks": [{"name": "transformer"}]}]},
    "tasks": {"one": {"source": {}, "inputs": {}, "objective": {}, "batch": 4}},
}


def built(**changes: Any) -> RunConfig:
    return configs.build(RunConfig, {**LEAST, **changes}, "config")


def test_a_config_needs_steps_modalities_a_model_and_tasks() -> None:
    assert built().steps == 3
    for key in LEAST:
        block = {k: v for k, v in LEAST.items() if k != key}
        with pytest.raises(UserError, match=rf"'config\.{key}' is missing"):
            configs.build(RunConfig, block, "config")


def test_defaults_are_the_documented_ones() -> None:
    run = built()
    assert run.dtype == DtypeConfig("float32", "float32")
    assert run.schedule == ScheduleConfig("shares", (), 0)
    assert run.evaluation == EvaluationConfig(0, 128)
    assert run.log == LogConfig(20, True, "") and run.seed == 0


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"schedule": {"rebalance_every": -1}}, r"schedule\.rebalance_every is -1"),
        ({"evaluation": {"every": -1}}, r"evaluation\.every is -1"),
        ({"evaluation": {"batch": 0}}, r"evaluation\.batch is 0"),
        ({"log": {"flush_every": 0}}, r"log\.flush_every is 0"),
        ({"sed": 1}, "Unknown config key 'config.sed'.*'seed'"),
        ({"log": {"wand": "x"}}, r"'config\.log\.wand'.*'wandb'"),
    ],
)
def test_keys_out_of_bounds_and_unknown_ones_are_named(block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**block)


def test_what_a_change_of_each_key_means_for_a_run_that_exists() -> None:
    """As the configuration reference states it: most of a config must not change."""
    classes = {f.name: configs.key_class(f.name, RunConfig) for f in fields(RunConfig)}
    free = {
        "steps", "mesh", "loader", "checkpoint", "evaluation", "limits", "log", "profile",
    }  # fmt: skip
    assert {name for name, of in classes.items() if of == "free"} == free
    assert {name for name, of in classes.items() if of == "schedule"} == {"schedule", "optimizer"}
