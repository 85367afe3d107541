"""The parts of a config that come and go as a whole: tasks, modalities and towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Block = dict[str, Any]
TOWERS = "model.towers"
SECTIONS = ("tasks", "modalities", TOWERS)


def blocks(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """Return the blocks by name at the dotted key of a section; none where the config lacks it."""
    block: Any = config
    for name in section.split("."):
        block = block.get(name) or {}
    result: Mapping[str, Any] = block
    return result


def alike(one: Block, other: Block) -> tuple[Block, Block]:
    """Return two configs as they are, or with towers by name in both where one alone has them so."""
    if bool(blocks(one, TOWERS)) == bool(blocks(other, TOWERS)):
        return one, other
    return _with_towers(one), _with_towers(other)


def _with_towers(config: Block) -> Block:
    if blocks(config, TOWERS) or "model" not in config:
        return config
    keys = {key: value for key, value in config["model"].items() if key != "towers"}
    return {**config, "model": {"towers": {"trunk": keys}}}
