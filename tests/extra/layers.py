"""Layers from the keys that a config would give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.core import config as configs
from mmjax.nn.experts import Experts, ExpertsConfig


def block(name: str, width: int, **keys: Any) -> Any:
    """Return the layer of a block `{name: ..., **keys}`."""
    return configs.component("blocks", {"name": name, **keys}, "block").build(width)


def experts(width: int, hidden: int, keys: Mapping[str, Any]) -> Experts:
    """Return experts with the keys of a block's `experts`."""
    return Experts(width, hidden, configs.build(ExpertsConfig, keys, "experts"))
