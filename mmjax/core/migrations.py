"""What configs of earlier versions mean today: the table of changed defaults.

A checkpoint holds the keys that its config set, not the defaults it relied on. When a default changes, a row of
`ROWS` writes the old default into every older config, so that its run is loaded, evaluated and resumed as before.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Block = dict[str, Any]

# Increase it with every change of the table.
VERSION = 2
# What the meta data of a checkpoint call the version of their config; checkpoints before version 2 lack it.
KEY = "config_version"


def always(config: Block, block: Block, path: tuple[str, ...]) -> bool:
    """Accept every block that the path matches."""
    del config, block, path
    return True


def named(*names: str) -> Callable[[Block, Block, tuple[str, ...]], bool]:
    """Accept blocks with one of these values of `name`."""
    return lambda config, block, path: block.get("name") in names


def of_modality(*names: str) -> Callable[[Block, Block, tuple[str, ...]], bool]:
    """Accept blocks `tasks.TASK.inputs.MODALITY` whose modality has one of these names in `config.modalities`."""
    return lambda config, block, path: (
        config.get("modalities", {}).get(path[-1], {}).get("name") in names
    )


def of_several(*names: str) -> Callable[[Block, Block, tuple[str, ...]], bool]:
    """Accept blocks `tasks.TASK` with two inputs or more whose modalities have these names."""

    def accept(config: Block, block: Block, path: tuple[str, ...]) -> bool:
        del path
        known = {m for m, b in config.get("modalities", {}).items() if b.get("name") in names}
        return len(known & block.get("inputs", {}).keys()) > 1

    return accept


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
    when: Callable[[Block, Block, tuple[str, ...]], bool] = always


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


def upgrade(config: Mapping[str, Any], version: int) -> Block:
    """Return `config`, written for `version`, as a config of today's version that means the same."""
    upgraded: Block = copy.deepcopy(dict(config))
    for row in ROWS:
        if version < row.version:
            if "*" not in row.path:
                _make(upgraded, row.path)
            for path, block in _blocks(upgraded, tuple(row.path.split("."))):
                if row.key not in block and row.when(upgraded, block, path):
                    block[row.key] = copy.deepcopy(row.old)
    return upgraded


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


def _blocks(
    tree: Any, pattern: tuple[str, ...], before: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Block]]:
    """The blocks of a config that a path matches, each with its own path; an empty path is the config itself."""
    if pattern in ((), ("",)):
        if isinstance(tree, dict):
            yield before, tree
        return
    first, *rest = pattern
    if isinstance(tree, dict):
        children = tree.items() if first == "*" else [(first, tree.get(first))]
    elif isinstance(tree, list) and (first == "*" or first.isdigit()):
        children = [(str(i), v) for i, v in enumerate(tree) if first in ("*", str(i))]
    else:
        return
    for name, child in children:
        yield from _blocks(child, tuple(rest), (*before, name))
