"""A config with every default written out: what is built, by dotted key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmjax.core import config as configs
from mmjax.experiment import Experiment
from mmjax.nn.experts import ExpertsConfig
from mmjax.nn.towers import TowerConfig
from mmjax.nn.trunk import GroupConfig

Values = dict[str, Any]


def resolve(made: Experiment) -> Values:
    """Return the values of all keys that decide what is trained, and of the layers (see `layers`)."""
    run = made.run
    values = {
        "steps": run.steps,
        **(towers(run.model.towers) if run.model.towers else trunk(run.model.trunk)),
        **flat(run.optimizer, "optimizer"),
        **named(run.optimizer.algorithm, "optimizer.algorithm"),
        **flat(run.dtype, "dtype"),
        "schedule.rule": run.schedule.rule,
    }
    for name, modality in made.modalities.items():
        values |= named(modality, f"modalities.{name}")
    for name, task in made.tasks.items():
        at = f"tasks.{name}"
        values |= {
            f"{at}.batch": task.batch,
            f"{at}.weight": task.config.weight,
            f"{at}.interval": task.config.interval,
        }
        values |= named(task.objective, f"{at}.objective")
        for modality, given in task.inputs.items():
            values |= flat(given.settings, f"{at}.inputs.{modality}")
            values[f"{at}.inputs.{modality}.instances"] = given.instances
    return values


def trunk(tower: TowerConfig) -> Values:
    """Return the keys of a model of one tower, with those of its layers under `layers`."""
    return {
        "model.width": tower.width,
        "model.norm": tower.norm,
        "model.norm_eps": tower.norm_eps,
        **flat(tower.per_modality, "model.per_modality"),
        **layers(tower.layers, "layers"),
    }


def towers(by_name: Mapping[str, TowerConfig]) -> Values:
    """Return the keys of several towers, with those of the layers under `model.towers.NAME.layers`."""
    values: Values = {}
    for name, tower in by_name.items():
        values |= flat(tower, f"model.towers.{name}")
    return values


def named(made: Any, at: str) -> Values:
    """Return the keys of what a block names, with the name itself."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(made).__name__).lower()
    return {f"{at}.name": name, **flat(made, at)}


def flat(value: Any, at: str) -> Values:
    """Return the fields of a dataclass, and of those in it."""
    values: Values = {}
    for field in dataclasses.fields(value):
        key, own = f"{at}.{field.name}", getattr(value, field.name)
        if dataclasses.is_dataclass(own):
            values |= flat(own, key)
        elif isinstance(own, Sequence) and own and isinstance(own[0], GroupConfig):
            values |= layers(own, key)
        else:
            values[key] = tuple(own) if isinstance(own, list) else own
    return values


def complete(made: Experiment) -> Values:
    """Return the whole config as nested blocks, with the default of every key that it leaves open."""
    config: Values = _plain(made.run)
    config["optimizer"]["algorithm"] = _named(made.run.optimizer.algorithm)
    config["modalities"] = {name: _named(each) for name, each in made.modalities.items()}
    config["tasks"] = {name: _complete_task(made, name) for name in made.tasks}
    return config


def _complete_task(made: Experiment, name: str) -> Values:
    task = made.tasks[name]
    return {
        **_plain(task.config),
        "source": _complete_source(task.config.source),
        "objective": _named(task.objective),
        "inputs": {
            each: {**_plain(own.settings), "instances": own.instances}
            for each, own in task.inputs.items()
        },
        "evaluators": {each: _named(own) for each, own in made.evaluators[name].items()},
    }


def _named(component: Any) -> Values:
    """Return the fields of a component with its name, and those of the sources that it names."""
    blocks = {
        field.name: _complete_source(value)
        for field in dataclasses.fields(component)
        if isinstance(value := getattr(component, field.name), Mapping) and "name" in value
    }
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(component).__name__).lower()
    return {"name": name, **_plain(component), **blocks}


def _complete_source(block: Mapping[str, Any]) -> Values:
    return _named(configs.component("sources", block, "source"))


def _plain(value: Any) -> Any:
    """Return JSON data of dataclasses and of what they hold; layers with their defaults."""
    if isinstance(value, GroupConfig):
        return {"repeat": value.repeat, "blocks": [_plain(written(b)) for b in value.blocks]}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} is no JSON data")


def layers(groups: Sequence[GroupConfig], at: str) -> Values:
    """Return `count`, and each key of the layers: its value where all have the same, else by layer.

    `experts` are the numbers of the layers that have some; their keys are those of `ExpertsConfig` and of its router.
    """
    all_of_them = [
        written(block) for group in groups for _ in range(group.repeat) for block in group.blocks
    ]
    values: Values = {f"{at}.count": len(all_of_them)}
    for key in dict.fromkeys(key for layer in all_of_them for key in layer):
        own = [layer[key] for layer in all_of_them if key in layer]
        same = all(each == own[0] for each in own)
        values[f"{at}.{key}"] = own[0] if same else tuple(own)
    sparse = tuple(i for i, layer in enumerate(all_of_them) if "experts.count" in layer)
    return {**values, f"{at}.experts": sparse}


def written(block: Mapping[str, Any]) -> Values:
    """Return a block with its defaults."""
    made = configs.component("blocks", block, "layer")
    layer = {"name": block["name"]}
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if isinstance(value, ExpertsConfig):
            layer |= flat(value, "experts") | named(value.router, "experts.router")
        elif dataclasses.is_dataclass(value):
            layer |= flat(value, field.name)
        elif field.name != "experts":
            layer[field.name] = value
    return layer


def set_keys(block: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that a config sets, named as `resolve` names them."""
    for key, _ in configs.flat(block):
        key = re.sub(r"^model\.layers\.\d+\.blocks\.\d+", "layers", key)
        key = re.sub(r"^model\.layers\.\d+\.repeat", "layers.count", key)
        key = re.sub(r"^(optimizer\.rules)\.\d+", r"\1", key)
        part = r"((?:objective|model\.towers\.\w+)\.\w+)"
        key = re.sub(rf"{part}\.\d+\.blocks\.\d+", r"\1", key)
        yield re.sub(rf"{part}\.\d+\.repeat", r"\1.count", key)
