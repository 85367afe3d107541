"""Rewrite configs of earlier versions as configs of today's that mean the same.

A checkpoint holds the keys that its config set, under the names of its time, and not the defaults it relied on. Each
version of configs has, in this order: changed structure (`MOVES`), changed names (`mmjax/core/renamed_keys.py`), and
changed defaults (`ROWS`, which write the old default where a config does not set the key), so that a run of an older
version is loaded, evaluated and resumed as before.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmjax.core.renamed_keys import RENAMES, Block, Condition, always, blocks, named, of_modality

# Increase it with every change of a default, of a name or of the place of a key.
VERSION = 3
# What the meta data of a checkpoint call the version of their config; checkpoints before version 2 lack it.
KEY = "config_version"


@dataclass(frozen=True)
class Row:
    """A default that has changed.

    Attributes:
      version: the first version of configs with the new default; older ones get the old value.
      path: dotted path of the block that holds the key; `*` stands for any name or index. A block without `*` in its
        path is made where it is missing, since its defaults hold there too.
      key: the key whose default changed.
      old: the value that an absent key stood for.
      when: `when(config, block, path)`: which of these blocks.
    """

    version: int
    path: str
    key: str
    old: Any
    when: Condition = always


def of_several(*names: str) -> Condition:
    """Accept blocks `tasks.TASK` with two inputs or more whose modalities have these names."""

    def accept(config: Block, block: Block, path: tuple[str, ...]) -> bool:
        del path
        known = {m for m, b in config.get("modalities", {}).items() if b.get("name") in names}
        return len(known & block.get("inputs", {}).keys()) > 1

    return accept


def has_losses(config: Block, block: Block, path: tuple[str, ...]) -> bool:
    """Accept `experts` with auxiliary losses."""
    del config, path
    return bool(block.get("losses"))


def begins_from_another(config: Block, block: Block, path: tuple[str, ...]) -> bool:
    """Accept the block `init_from` where it names a source."""
    del config
    return path == ("init_from",) and bool(block.get("path"))


# By path. A block that is only changed where it is there has a `*` for its name.
ROWS: tuple[Row, ...] = (
    Row(2, "*", "non_finite", True, begins_from_another),
    Row(2, "*", "strict", False, begins_from_another),
    Row(3, "*", "ignore", [".*"], begins_from_another),
    Row(2, "modalities.*", "max_frames", 2**31 - 1, named("video")),
    Row(
        2, "modalities.*", "max_pixels", 178_956_970, named("colours", "image", "video")
    ),  # Pillow's
    Row(2, "modalities.*", "max_seconds", 1e9, named("spectrogram", "waveform")),
    Row(2, "tasks.*", "shared_time", False, of_several("spectrogram", "video", "waveform")),
    Row(2, "tasks.*.inputs.*", "fit", "squash", of_modality("colours", "image", "video")),
    Row(2, "model.groups.*.pattern.*.experts", "losses_over", "batch", has_losses),
    Row(2, "tasks.*.objective.multimodal.*.pattern.*.experts", "losses_over", "batch", has_losses),
    Row(2, "tasks.*.objective.unimodal.*.pattern.*.experts", "losses_over", "batch", has_losses),
    # The tokenizer of the emoji data was the default, and a vocabulary could be larger than its tokenizer's.
    Row(2, "modalities.*", "pad_vocabulary_to", 0, named("text")),
    Row(2, "modalities.*", "tokenizer", "emoji/1.0.0/tokenizer.model", named("text")),
    # Mamba's norm became the published one.
    Row(2, "model.groups.*.pattern.*", "norm", "layer", named("mamba")),
    Row(2, "tasks.*.objective.*.*.pattern.*", "norm", "layer", named("mamba")),
)


# Keys that each algorithm of the optimizer read before version 3, when all of them stood beside each other.
_ALGORITHM_KEYS: Mapping[str, tuple[str, ...]] = {
    "adafactor": ("factored",),
    "adamw": ("b1", "b2", "eps", "moments_dtype"),
    "lion": ("b1", "b2", "moments_dtype"),
    "muon": ("b1", "b2", "eps", "momentum", "moments_dtype"),
}


def move_algorithm(config: Block) -> None:
    """Move the keys of the optimizer's algorithm into `optimizer.algorithm`; drop those that it did not read."""
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, dict):
        return
    every = {key for keys in _ALGORITHM_KEYS.values() for key in keys}
    read = _ALGORITHM_KEYS.get(str(optimizer.get("name", "adamw")), every)
    values = {key: optimizer.pop(key) for key in ("name", *sorted(every)) if key in optimizer}
    moved = {key: value for key, value in values.items() if key == "name" or key in read}
    if moved:
        optimizer["algorithm"] = moved


_BLOCKS = ("model.groups.*.pattern.*", "tasks.*.objective.*.*.pattern.*")  # of version 2


def move_per_modality(config: Block) -> None:
    """Move `untie` and `modalities` of a block, and `model.norm_modalities`, into one key `per_modality`."""
    for _, model in blocks(config, "model"):
        norms = model.pop("norm_modalities", None)
        if norms:
            model["per_modality"] = {"modalities": norms, "parts": ["norm"]}
    for path in _BLOCKS:
        for _, block in blocks(config, path):
            if block.get("name") in ("transformer", "mamba"):
                parts, modalities = block.pop("untie", ()), block.pop("modalities", ())
                if parts and modalities:
                    block["per_modality"] = {"modalities": modalities, "parts": parts}


def drop_empty_keys(config: Block) -> None:
    """Drop keys of blocks that had no effect and are refused now: empty `experts`, and `untie` of a bottleneck."""
    for path in _BLOCKS:
        for _, block in blocks(config, path):
            if block.get("experts") == {}:
                del block["experts"]
            if block.get("name") == "bottleneck" and not block.get("untie", True):
                del block["untie"]


def move_intervals(config: Block) -> None:
    """Move the weights of tasks that run at intervals into the key `interval`, those of phases into `intervals`."""
    phases = [phase for _, phase in blocks(config, "schedule.phases.*")]
    rules = [schedule.get("rule", "shares") for _, schedule in blocks(config, "schedule")]
    rules += [phase["rule"] for phase in phases if phase.get("rule")]
    if "interval" not in rules:
        return
    for holder, old, new in [
        *((task, "share", "interval") for _, task in blocks(config, "tasks.*")),
        *((phase, "weights", "intervals") for phase in phases),
    ]:
        if old in holder:
            holder[new] = copy.deepcopy(holder[old])
            if all(rule == "interval" for rule in rules):
                del holder[old]


# By version, what changed the structure of a config.
MOVES: Mapping[int, tuple[Callable[[Block], None], ...]] = {
    3: (move_algorithm, drop_empty_keys, move_per_modality, move_intervals),
}


def upgrade(config: Mapping[str, Any], version: int) -> Block:
    """Return `config`, written for `version`, as a config of today's version that means the same."""
    upgraded: Block = copy.deepcopy(dict(config))
    for later in range(version + 1, VERSION + 1):
        for move in MOVES.get(later, ()):
            move(upgraded)
        for rename in RENAMES:
            if rename.version == later:
                rename.apply(upgraded)
        for row in ROWS:
            if row.version == later:
                _write(upgraded, row)
    return upgraded


def _write(config: Block, row: Row) -> None:
    if "*" not in row.path:
        _make(config, row.path)
    for path, block in blocks(config, row.path):
        if row.key not in block and row.when(config, block, path):
            block[row.key] = copy.deepcopy(row.old)


def upgrade_meta(meta: Mapping[str, Any]) -> Block:
    """Return a checkpoint's meta data with the config that today's version reads."""
    if "config" not in meta:
        return dict(meta)
    upgraded = {**meta, "config": upgrade(meta["config"], meta.get(KEY, 1)), KEY: VERSION}
    if "identities" in meta:
        upgraded["identities"] = {_renamed(k): digest for k, digest in meta["identities"].items()}
    return upgraded


def _renamed(identity: str) -> str:
    """Return today's name of an identity: extensions of the kind `blocks` were called `layers`."""
    return re.sub(r"^code\.layers/", "code.blocks/", identity)


def _make(config: Block, path: str) -> None:
    for name in filter(None, path.split(".")):
        config = config.setdefault(name, {})
