"""Configs of version 2 are read under today's names, and old names in new configs are explained."""

from __future__ import annotations

from typing import Any

import pytest

from mmjax.core import config as configs
from mmjax.core.errors import UserError
from mmjax.core.migrations import MOVES, upgrade
from mmjax.core.renamed_keys import RENAMES, new_name
from mmjax.run_config import RunConfig

EXPERTS = {
    "count": 4, "group": 8, "groups": 2, "local": {"text": 0.1}, "spread": {"text": 0.2}, "threshold": {"text": 1.0},
    "router": {"name": "token_choice", "top": 2, "priority": True}, "causal": {"hidden": 5},
}  # fmt: skip
EXPERTS_TODAY = {
    "count": 4, "group_size": 8, "min_groups": 2, "local_entropy": {"text": 0.1}, "global_entropy": {"text": 0.2},
    "entropy_floor": {"text": 1.0}, "router": {"name": "token_choice", "top_k": 2, "batch_priority": True},
    "causal": {"mlp_dim": 5},
}  # fmt: skip
OLD: dict[str, Any] = {
    "steps": 3,
    "modalities": {
        "image": {"name": "image", "patch": 4, "buckets": 8},
        "clip": {"name": "video", "time_buckets": 2, "buckets": 4},
        "sound": {"name": "waveform", "rate": 8000, "buckets": 16},
        "own": {"name": "depth", "buckets": 3, "rate": 2},  # an extension's keys are its own
    },
    "model": {
        "width": 8,
        "groups": [
            {"repeat": 1, "pattern": [
                {"name": "transformer", "heads": 2, "hidden": 16, "kernel": "plain", "order": "post",
                 "experts": EXPERTS, "untie": ["mlp"], "modalities": ["image", "sound"]},
                {"name": "bottleneck", "heads": 2, "hidden": 16, "modalities": ["image"]},
                {"name": "mamba", "state": 2, "untie": [], "modalities": []},
                {"name": "transformer", "experts": {"count": 2, "router": {"name": "soft", "columns": 3}}},
                {"name": "soft", "heads": 3, "order": "own"},
            ]},
        ],
        "norm_modalities": ["image", "sound"],
    },
    "tasks": {
        "a": {
            "share": 2,
            "view": "own_clock",
            "inputs": {
                "image": {"drop": 0.5},
                "sound": {"rate": 8000, "gain": 6.0, "level": 0.1, "drop": 0.0},
                "own": {"drop": 1, "rate": 2},
            },
            "objective": {
                "name": "contrastive", "between": ["image", "sound"], "form": "sigmoid", "concept": "label", "joint": 4,
                "temperature": 0.1, "together": True,
            },
            "buckets": {"long": {"inputs": {"image": {"drop": 0.1}}, "share": 3}},
            "evaluators": {
                "r": {"name": "retrieval", "between": ["image", "sound"], "concept": "label"},
                "z": {"name": "zero_shot", "label": "concept"},
            },
        },
        "b": {
            "objective": {
                "name": "transfusion", "order": ["image"], "target": "v", "limit": 0.4, "drop": 0.2, "swap": 0.1,
                "across": True, "mutual": True, "channels": 4, "steps": 7,
            },
        },
        "c": {"objective": {"name": "masked_image", "ratio": 0.5, "inner": 4, "depth": 1, "heads_per_layer": 2}},
        "d": {
            "objective": {
                "name": "cross_modal", "between": ["image", "sound"], "concept": "", "joint": 4, "initial": 1.0,
            },
        },
        "e": {"objective": {"name": "fusion", "reading": "mean"}},
        "f": {
            "objective": {
                "name": "coca",
                "unimodal": [{"repeat": 1, "pattern": [{"name": "transformer", "heads": 2, "hidden": 4}]}],
                "multimodal": [{"repeat": 1, "pattern": [{"name": "cross_transformer", "heads": 2, "hidden": 4}]}],
                "pooler_heads": 2,
            },
        },
    },
    "schedule": {
        "measure": 5,
        "phases": [
            {"start": 9, "weights": {"a": 1}, "tasks": {"a": {
                "inputs": {"image": {"drop": 0.2}},
                "buckets": {"long": {"inputs": {"image": {"drop": 0.3}}, "share": 1}},
            }}},
        ],
    },
    "optimizer": {"name": "adafactor", "factored": 4, "final": 0.1, "view": "own_moments"},
    "mesh": {"across": "fsdp"},
    "loader": {"ahead": 2},
    "limits": {"invalid": 1, "non_finite": 2, "stuck": 3.0},
    "log": {"every": 7},
}  # fmt: skip
TODAY: dict[str, Any] = {
    "steps": 3,
    "modalities": {
        "image": {"name": "image", "patch": 4, "max_positions": 8},
        "clip": {"name": "video", "max_time_positions": 2, "max_positions": 4},
        "sound": {"name": "waveform", "sample_rate": 8000, "max_positions": 16},
        "own": {"name": "depth", "buckets": 3, "rate": 2},
    },
    "model": {
        "width": 8,
        "layers": [
            {"repeat": 1, "blocks": [
                {"name": "transformer", "num_heads": 2, "mlp_dim": 16, "attention_impl": "plain",
                 "norm_position": "post", "experts": EXPERTS_TODAY,
                 "per_modality": {"modalities": ["image", "sound"], "parts": ["mlp"]}},
                {"name": "bottleneck", "num_heads": 2, "mlp_dim": 16, "modalities": ["image"]},
                {"name": "mamba", "state": 2},
                {"name": "transformer", "experts": {"count": 2, "router": {"name": "soft", "slots_per_expert": 3}}},
                {"name": "soft", "heads": 3, "order": "own"},
            ]},
        ],
        "per_modality": {"modalities": ["image", "sound"], "parts": ["norm"]},
    },
    "tasks": {
        "a": {
            "weight": 2,
            "update_scope": "own_clock",
            "inputs": {
                "image": {"token_drop": 0.5},
                "sound": {"sample_rate": 8000, "gain_db": 6.0, "rms": 0.1, "token_drop": 0.0},
                "own": {"drop": 1, "rate": 2},
            },
            "objective": {
                "name": "contrastive", "modalities": ["image", "sound"], "loss": "sigmoid", "positive_key": "label",
                "embed_dim": 4, "init_temperature": 0.1, "joint_forward": True,
            },
            "shapes": {"long": {"inputs": {"image": {"token_drop": 0.1}}, "weight": 3}},
            "evaluators": {
                "r": {"name": "retrieval", "modalities": ["image", "sound"], "positive_key": "label"},
                "z": {"name": "zero_shot", "label": "concept"},
            },
        },
        "b": {
            "objective": {
                "name": "transfusion", "modalities": ["image"], "prediction": "v", "max_time": 0.4,
                "condition_dropout": 0.2, "reverse_prob": 0.1, "attend_across_items": True,
                "bidirectional_spans": True, "unet_channels": 4, "sampling_steps": 7,
            },
        },
        "c": {
            "objective": {
                "name": "masked_image", "mask_ratio": 0.5, "decoder_width": 4, "decoder_depth": 1, "decoder_heads": 2,
            },
        },
        "d": {
            "objective": {
                "name": "cross_modal", "modalities": ["image", "sound"], "positive_key": "", "embed_dim": 4,
                "init_temperature": 1.0,
            },
        },
        "e": {"objective": {"name": "fusion", "readout": "mean"}},
        "f": {
            "objective": {
                "name": "coca",
                "unimodal": [{"repeat": 1, "blocks": [{"name": "transformer", "num_heads": 2, "mlp_dim": 4}]}],
                "multimodal": [{"repeat": 1, "blocks": [{"name": "cross_transformer", "num_heads": 2, "mlp_dim": 4}]}],
                "pooler_heads": 2,
            },
        },
    },
    "schedule": {
        "rebalance_every": 5,
        "phases": [
            {"start": 9, "weights": {"a": 1}, "tasks": {"a": {
                "inputs": {"image": {"token_drop": 0.2}},
                "shapes": {"long": {"inputs": {"image": {"token_drop": 0.3}}, "weight": 1}},
            }}},
        ],
    },
    "optimizer": {
        "end_lr_ratio": 0.1, "update_scope": "own_moments",
        "algorithm": {"name": "adafactor", "min_dim_to_factor": 4},
    },
    "mesh": {"dcn_axis": "fsdp"},
    "loader": {"prefetch": 2},
    "limits": {"max_invalid_examples": 1, "max_non_finite_steps": 2, "watchdog_seconds": 3.0},
    "log": {"flush_every": 7},
}  # fmt: skip


def keys(tree: Any) -> set[str]:
    """Return all keys of a config, at any depth."""
    if isinstance(tree, dict):
        return {*tree, *(k for v in tree.values() for k in keys(v))}
    return {k for v in tree for k in keys(v)} if isinstance(tree, list) else set()


def test_a_config_of_version_2_is_read_under_todays_names() -> None:
    assert upgrade(OLD, 2) == TODAY
    assert upgrade(TODAY, 3) == TODAY


def test_every_new_name_is_in_that_config() -> None:
    names = {new for rename in RENAMES for new in rename.keys.values()}
    assert names <= keys(TODAY)


def test_a_rename_keeps_the_order_of_keys() -> None:
    """Tasks take turns in the order of the config."""
    assert list(upgrade(OLD, 2)["tasks"]["a"])[:3] == ["weight", "update_scope", "inputs"]


def test_intervals_have_a_key_of_their_own() -> None:
    config = {
        "tasks": {"a": {"share": 2}, "b": {}},
        "schedule": {"rule": "interval", "phases": [{"start": 4, "weights": {"a": 3}}]},
    }
    assert upgrade(config, 2) == {
        "tasks": {"a": {"interval": 2}, "b": {}},
        "schedule": {"rule": "interval", "phases": [{"start": 4, "intervals": {"a": 3}}]},
    }


def test_numbers_that_two_rules_read_are_there_for_both() -> None:
    config = {
        "tasks": {"a": {"share": 2}},
        "schedule": {"phases": [{"start": 4, "weights": {"a": 3}, "rule": "interval"}]},
    }
    assert upgrade(config, 2) == {
        "tasks": {"a": {"weight": 2, "interval": 2}},
        "schedule": {
            "phases": [{"start": 4, "weights": {"a": 3}, "rule": "interval", "intervals": {"a": 3}}]
        },
    }


def test_keys_that_said_nothing_are_dropped() -> None:
    """Version 2 ignored them; today's blocks refuse them."""
    pattern = [
        {"name": "transformer", "experts": {}},
        {"name": "bottleneck", "untie": [], "modalities": ["image"]},
        {"name": "bottleneck", "untie": ["mlp"]},  # never right: the schema refuses it
    ]
    upgraded = upgrade({"model": {"groups": [{"repeat": 1, "pattern": pattern}]}}, 2)
    assert upgraded["model"]["layers"][0]["blocks"] == [
        {"name": "transformer"},
        {"name": "bottleneck", "modalities": ["image"]},
        {"name": "bottleneck", "untie": ["mlp"]},
    ]


def test_moves_leave_odd_configs_alone() -> None:
    """What a config lacks, no move adds: the schema reports it."""
    odd: list[dict[str, Any]] = [
        {}, {"model": {}}, {"tasks": {}}, {"schedule": {"phases": []}},
        # And what no schema allows: a damaged file must be named, and not end in a traceback.
        {"model": 3}, {"model": {"groups": [3]}}, {"tasks": [3]}, {"tasks": {"a": 3}}, {"schedule": 3},
        {"schedule": {"rule": ["interval"], "phases": 3}}, {"schedule": {"rule": "interval", "phases": [3]}},
        {"optimizer": 3},
    ]  # fmt: skip
    for config in odd:
        assert upgrade(config, 2).keys() >= config.keys()
        for move in MOVES[3]:
            changed: dict[str, Any] = dict(config)
            move(changed)
            assert changed == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"limits": {"stuck": 3}}, "'config.limits.stuck'. It is called 'watchdog_seconds' now."),
        ({"log": {"every": 3}}, "'config.log.every'. It is called 'flush_every' now."),
        ({"checkpoint": {"evry": 3}}, "'config.checkpoint.evry'. Did you mean 'every'?"),
    ],
)
def test_an_old_name_in_a_new_config_is_explained(config: Any, message: str) -> None:
    whole = {
        "steps": 1,
        "modalities": {},
        "model": {"width": 1, "layers": []},
        "tasks": {},
        **config,
    }
    with pytest.raises(UserError) as raised:
        configs.build(RunConfig, whole, "config")
    assert message in str(raised.value)


def test_a_name_is_explained_only_where_the_new_one_is_a_key() -> None:
    assert new_name("untie", ["heads", "per_modality"]) == " It is called 'per_modality.parts' now."
    assert new_name("untie", ["heads"]) == ""
    assert new_name("order", ["norm_position"]) == " It is called 'norm_position' now."
    assert new_name("order", ["modalities"]) == " It is called 'modalities' now."
    assert new_name("stuk", ["watchdog_seconds"]) == ""
