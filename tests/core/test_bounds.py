"""Every number that a config can hold has bounds, and is refused by its key outside of them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import toyrun

from mmjax.core import config as configs
from mmjax.core.bounds import OutOfBounds, check, contains
from mmjax.core.errors import UserError
from mmjax.experiment import make_experiment
from mmjax.generation.decoding import Sampling
from mmjax.run_config import RunConfig
from mmjax.task import ShapeConfig, TaskConfig

# What a block of each class needs beside the key that is tried.
NEEDED: dict[str, dict[str, Any]] = {
    "Bottleneck": {"num_heads": 2, "mlp_dim": 4, "modalities": ["a"]},
    "CausalConfig": {"mlp_dim": 4},
    "Classification": {"classes": 2, "modalities": ["a"], "label": "l"},
    "Coca": {
        "unimodal": [{"repeat": 1, "blocks": []}],
        "multimodal": [{"repeat": 1, "blocks": []}],
    },
    "Contrastive": {"modalities": ["a", "b"]},
    "CrossModal": {"modalities": ["a", "b"]},
    "CrossTransformer": {"num_heads": 2, "mlp_dim": 4},
    "ExpertsConfig": {"count": 2},
    "Fusion": {"classes": 2, "modalities": ["a", "b"], "label": "l"},
    "GatedCrossAttention": {"num_heads": 2, "mlp_dim": 4},
    "GroupConfig": {"repeat": 1, "blocks": []},
    "LowRankConfig": {"match": [".*"]},
    "MeanHeads": {"times": 1},
    "Member": {"objective": {"name": "masked_image"}},
    "Latents": {"num_heads": 2, "mlp_dim": 4, "count": 2, "depth": 1},
    "ModelConfig": {"width": 8, "layers": []},
    "MovingEmoji": {"split": "train"},
    "NewRows": {"count": 1},
    "PhaseConfig": {"start": 1},
    "RepeatHeads": {"times": 1},
    "ResizeGrid": {"old": [1], "new": [1]},
    "PooledGrid": {"size": 2},
    "Queries": {"num_heads": 2, "mlp_dim": 4, "count": 2, "depth": 1},
    "RuleConfig": {"match": ".*"},
    "RunConfig": {"steps": 1, "modalities": {}, "model": {"width": 8, "layers": []}, "tasks": {}},
    "Split": {"sizes": [1], "index": 0},
    "SplitHeads": {"count": 1},
    "TaskConfig": {"source": {}, "inputs": {}, "objective": {}, "batch": 1},
    "TeacherConfig": {"of": ["a"]},
    "TowerConfig": {"width": 8, "layers": []},
    "Transformer": {"num_heads": 2, "mlp_dim": 4},
    "Transfusion": {"modalities": ["a", "b"], "discrete": ["a"]},
}
# The name of a number in a dictionary, where not every name will do.
NAMES = {("CrossModal", "weights"): "a b", ("ExpertsConfig", "losses"): "z"}
# Numbers that may be below 0, and why.
SIGNED = {
    **{(name, "axis"): "axes count from the end too"
       for name in ("JoinHeads", "MeanHeads", "NewRows", "RepeatHeads", "Rotary", "Split", "SplitHeads")},
    ("Coca", "bias"): "added to logits",
    ("Contrastive", "bias"): "added to logits",
    **{("MeshConfig", axis): "-1 is what is left; sizes are checked with the devices"
       for axis in ("data", "fsdp", "expert", "tensor", "sequence")},
    ("MovingEmoji", "seed"): "any integer",
    ("RunConfig", "seed"): "any integer",
}  # fmt: skip
# Bounded where crops and fits of pictures are made.
ELSEWHERE = {"ImageInput", "VideoInput"}


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the dataclasses of a type and of their fields, each class before its fields'."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for each in typing.get_type_hints(hint).values():
            yield from classes_in(each)
    for argument in typing.get_args(hint):
        yield from classes_in(argument)


def config_classes() -> list[type]:
    """Return all dataclasses that a config's blocks are built as."""
    roots: list[Any] = [
        RunConfig,
        TaskConfig,
        ShapeConfig,
        Sampling,
    ]
    for kind in configs.KINDS:
        own = [n for n in configs.names(kind) if not n.startswith(("toy", "other"))]
        found = [configs.resolve(kind, name, "") for name in own]
        roots += found + [each.Input for each in found if hasattr(each, "Input")]
    each = [cls for root in roots for cls in classes_in(root)]
    return sorted(dict.fromkeys(each), key=lambda cls: cls.__name__)


def number(hint: Any) -> type | None:
    """Return int or float, if a field of this type holds such: itself, or None, a list or a dictionary of them."""
    if hint in (int, float):
        return typing.cast(type, hint)
    arguments = [a for a in typing.get_args(hint) if a not in (type(None), str, ...)]
    origin = typing.get_origin(hint)
    is_of_them = origin in (tuple, dict, list, typing.Union, types.UnionType)
    return number(arguments[0]) if is_of_them and len(arguments) == 1 else None


def numbers() -> list[tuple[type, str]]:
    return [
        (cls, field.name)
        for cls in config_classes()
        if cls.__name__ not in ELSEWHERE
        for field in dataclasses.fields(cls)
        if field.init and number(typing.get_type_hints(cls)[field.name])
    ]


def build(cls: type, key: str, value: Any) -> Any:
    hint, block = typing.get_type_hints(cls)[key], dict(NEEDED.get(cls.__name__, {}))
    origin = typing.get_origin(hint)
    if origin is dict:
        value = {NAMES.get((cls.__name__, key), "a"): value}
    elif origin is tuple:
        value = [value]
    return configs.build(cls, {**block, key: value}, "here")


@pytest.mark.parametrize(("cls", "key"), numbers(), ids=lambda x: getattr(x, "__name__", x))
def test_a_number_has_bounds(cls: type, key: str) -> None:
    """Whatever it stands for, -1, NaN and what no type here can hold are errors that name it."""
    configs.build(cls, NEEDED.get(cls.__name__, {}), "here")
    huge = 2**63 if number(typing.get_type_hints(cls)[key]) is int else 1e39
    for bad in (-1, math.nan, huge):
        if bad == -1 and (cls.__name__, key) in SIGNED:
            build(cls, key, bad)
            continue
        with pytest.raises(UserError) as raised:
            build(cls, key, bad)
        assert key in str(raised.value), f"{cls.__name__}.{key}"


def test_the_walk_meets_every_kind_of_block() -> None:
    names = {cls.__name__ for cls in config_classes()}
    assert names >= {
        "RunConfig", "OptimizerConfig", "LimitsConfig", "MeshConfig", "WarmStartConfig", "GroupConfig",
        "RuleConfig", "TaskConfig", "SpectrogramInput", "Transfusion", "Retrieval", "MovingEmoji", "TokenChoice",
        "PhaseConfig", "PhaseTaskConfig",
        "Transformer", "Mamba", "ExpertsConfig", "CausalConfig", "Adamw", "Muon", "Adafactor", "Lion",
    }  # fmt: skip
    assert len(numbers()) > 90
    known = {(cls.__name__, key) for cls, key in numbers()}
    assert SIGNED.keys() <= known and NAMES.keys() <= known and {n for n in NEEDED} <= names


def test_a_class_of_the_config_is_a_frozen_dataclass_of_this_package() -> None:
    for cls in config_classes():
        assert cls.__module__.startswith("mmjax"), cls
        assert inspect.isclass(cls) and dataclasses.is_dataclass(cls)


EDGES = [
    ("optimizer.learning_rate", [0.0, 1e-9, 10.0], [-1e-9]),
    ("optimizer.warmup", [0, 10**10], [-1]),
    ("optimizer.end_lr_ratio", [0.0, 1.0], [1.1]),
    ("optimizer.algorithm.b1", [0.0, 0.999], [1.0]),
    ("optimizer.algorithm.b2", [0.0, 0.999], [1.0]),
    ("optimizer.ema", [0.0, 0.9999], [1.0]),
    ("optimizer.algorithm.eps", [1e-30], [0.0]),
    ("optimizer.accumulate", [1], [0]),
    ("steps", [1, 2**31 - 1], [0, 2**31]),
    ("evaluation.batch", [1], [0]),
    ("checkpoint.keep", [1], [0]),
    ("limits.memory_gib", [0.0, 0.5], [-0.5]),
    ("log.flush_every", [1], [0]),
]


@pytest.mark.parametrize(("key", "good", "bad"), EDGES)
def test_bounds_are_where_they_should_be(key: str, good: list[Any], bad: list[Any]) -> None:
    base = {**NEEDED["RunConfig"], "steps": 5}
    for value in good:
        configs.build(RunConfig, configs.override(base, [f"{key}={value!r}"]), "config")
    for value in bad:
        with pytest.raises(UserError) as raised:
            configs.build(RunConfig, configs.override(base, [f"{key}={value!r}"]), "config")
        assert str(raised.value).startswith(f"config.{key} is {value}; it must be ")


@pytest.mark.parametrize(
    ("kind", "name", "key", "bad"),
    [
        ("objectives", "masked_image", "mask_ratio", [0.0, 1.0]),
        ("objectives", "contrastive", "init_temperature", [0.0]),
        ("objectives", "cross_modal", "init_temperature", [0.0]),
        ("objectives", "classification", "smoothing", [1.0]),
        ("objectives", "transfusion", "reverse_prob", [1.5]),
        ("objectives", "transfusion", "pack", [0]),
        ("modalities", "waveform", "patch", [0]),
        ("modalities", "spectrogram", "hop", [0]),
        ("modalities", "image", "patch", [0]),
        ("sources", "moving_emoji", "actors", [0, 3]),
        ("evaluators", "retrieval", "at", [0]),
    ],
)
def test_bounds_of_components(kind: str, name: str, key: str, bad: list[Any]) -> None:
    cls = configs.resolve(kind, name, "")
    for value in bad:
        with pytest.raises(UserError, match=key):
            build(cls, key, value)


def test_the_message_names_the_key_within_its_block() -> None:
    @dataclasses.dataclass(frozen=True)
    class Block:
        sizes: tuple[int, ...] = ()
        weights: dict[str, float] = dataclasses.field(default_factory=dict)
        part: float | None = None

        def __post_init__(self) -> None:
            check(self, sizes="[1, inf)", weights="(0, 2]", part="[0, 1)")

    Block((1, 2), {"a": 2.0}, 0.0)
    for values, words in (
        ({"sizes": (3, 0)}, "Block.sizes[1] is 0; it must be at least 1."),
        ({"weights": {"a": 1.0, "b": 0.0}}, "Block.weights.b is 0.0; it must be in (0, 2]."),
        ({"part": 1.0}, "Block.part is 1.0; it must be in [0, 1)."),
        ({"part": math.nan}, "Block.part is nan; it must be in [0, 1)."),
    ):
        with pytest.raises(OutOfBounds) as raised:
            Block(**values)
        assert str(raised.value) == words
    with pytest.raises(UserError, match=r"^here\.there\.sizes\[0\] is 0"):
        configs.build(Block, {"sizes": [0]}, "here.there")


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [-1e-9, 1]),
        ("(0, 1]", [1, 0.5], [0, 1.1]),
        ("[2, inf)", [2, 1e300], [1.9, math.inf, math.nan, -math.inf]),
        ("[-1, -1]", [-1], [0, -2]),
    ],
)
def test_intervals(interval: str, inside: list[float], outside: list[float]) -> None:
    assert all(contains(interval, value) for value in inside)
    assert not any(contains(interval, value) for value in outside)


@pytest.mark.parametrize("key", ["num_heads", "mlp_dim", "rotary"])
def test_a_layer_with_a_size_below_0_is_refused_by_its_place(key: str) -> None:
    block = {"name": "transformer", "num_heads": 2, "mlp_dim": 8, key: -1}
    groups = [{"repeat": 1, "blocks": [block]}]
    with pytest.raises(UserError, match=rf"blocks\[0\]\.{key} is -1"):
        make_experiment(toyrun.block(f"model.layers={groups}"))
