"""Keys of configs that have another name today, as data.

Older configs are read under the new names (`mmjax.core.migrations`), and a new config that still has an old one gets
the new name in its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Block = dict[str, Any]
# `condition(config, block, path)`: whether a change is for this block.
Condition = Callable[[Block, Block, tuple[str, ...]], bool]


def always(config: Block, block: Block, path: tuple[str, ...]) -> bool:
    """Accept every block that the path matches."""
    del config, block, path
    return True


def named(*names: str) -> Condition:
    """Accept blocks with one of these values of `name`."""
    return lambda config, block, path: block.get("name") in names


def of_modality(*names: str) -> Condition:
    """Accept blocks `tasks.TASK.inputs.MODALITY` whose modality has one of these names in `config.modalities`."""
    return lambda config, block, path: (
        config.get("modalities", {}).get(path[-1], {}).get("name") in names
    )


def blocks(tree: Any, path: str) -> Iterator[tuple[tuple[str, ...], Block]]:
    """Yield the blocks of a config that a dotted path matches, each with its own path.

    `*` stands for any name or index; an empty path is the config itself.
    """
    yield from _blocks(tree, tuple(filter(None, path.split("."))), ())


def _blocks(
    tree: Any, pattern: tuple[str, ...], before: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Block]]:
    if not pattern:
        if isinstance(tree, dict):
            yield before, tree
        return
    first, *deeper = pattern
    if isinstance(tree, dict):
        children = tree.items() if first == "*" else [(first, tree.get(first))]
    elif isinstance(tree, list | tuple) and (first == "*" or first.isdigit()):
        children = [(str(i), v) for i, v in enumerate(tree) if first in ("*", str(i))]
    else:
        return
    for name, child in children:
        yield from _blocks(child, tuple(deeper), (*before, name))


@dataclass(frozen=True)
class Rename:
    """A key with another name.

    Attributes:
      version: the first version of configs with the new name.
      path: dotted path of the block that holds the key, under the names that renames before this one leave.
      keys: old name -> new name.
      when: which of the blocks that the path matches.
    """

    version: int
    path: str
    keys: dict[str, str]
    when: Condition = always

    def apply(self, config: Block) -> None:
        """Rename the keys in place; their order stays."""
        for path, block in blocks(config, self.path):
            if self.when(config, block, path) and self.keys.keys() & block.keys():
                renamed = {self.keys.get(key, key): value for key, value in block.items()}
                block.clear()
                block.update(renamed)


IMAGES, SOUNDS = ("colours", "image", "video"), ("spectrogram", "waveform")
_BLOCK = {
    "heads": "num_heads",
    "hidden": "mlp_dim",
    "kernel": "attention_impl",
    "order": "norm_position",
}
_EXPERTS = {
    "group": "group_size",
    "groups": "min_groups",
    "local": "local_entropy",
    "spread": "global_entropy",
    "threshold": "entropy_floor",
}
_ROUTER = {"top": "top_k", "columns": "slots_per_expert", "priority": "batch_priority"}
_CONTRASTIVE = {
    "between": "modalities",
    "form": "loss",
    "concept": "positive_key",
    "joint": "embed_dim",
    "temperature": "init_temperature",
    "together": "joint_forward",
}
_TRANSFUSION = {
    "order": "modalities",
    "target": "prediction",
    "limit": "max_time",
    "drop": "condition_dropout",
    "swap": "reverse_prob",
    "across": "attend_across_items",
    "mutual": "bidirectional_spans",
    "channels": "unet_channels",
    "steps": "sampling_steps",
}
_INPUTS = (
    "tasks.*.inputs.*",
    "tasks.*.shapes.*.inputs.*",
    "schedule.phases.*.tasks.*.inputs.*",
    "schedule.phases.*.tasks.*.shapes.*.inputs.*",
)
_LAYERS = ("model.layers.*", "tasks.*.objective.*.*")

RENAMES: tuple[Rename, ...] = (
    Rename(3, "limits", {"invalid": "max_invalid_examples", "non_finite": "max_non_finite_steps"}),
    Rename(3, "limits", {"stuck": "watchdog_seconds"}),
    Rename(3, "loader", {"ahead": "prefetch"}),
    Rename(3, "log", {"every": "flush_every"}),
    Rename(3, "mesh", {"across": "dcn_axis"}),
    Rename(3, "modalities.*", {"buckets": "max_positions", "time_buckets": "max_time_positions"},
           named("text", *IMAGES, *SOUNDS)),
    Rename(3, "modalities.*", {"rate": "sample_rate"}, named(*SOUNDS)),
    Rename(3, "model", {"groups": "layers"}),
    *(Rename(3, path, {"pattern": "blocks"}) for path in _LAYERS),
    *(Rename(3, f"{path}.blocks.*", _BLOCK, named("transformer", "bottleneck", "cross_transformer"))
      for path in _LAYERS),
    *(Rename(3, f"{path}.blocks.*.experts", _EXPERTS) for path in _LAYERS),
    *(Rename(3, f"{path}.blocks.*.experts.router", _ROUTER) for path in _LAYERS),
    *(Rename(3, f"{path}.blocks.*.experts.causal", {"hidden": "mlp_dim"}) for path in _LAYERS),
    Rename(3, "optimizer", {"final": "end_lr_ratio", "view": "update_scope"}),
    Rename(3, "optimizer.algorithm", {"factored": "min_dim_to_factor"}),
    Rename(3, "schedule", {"measure": "rebalance_every"}),
    Rename(3, "tasks.*", {"share": "weight", "buckets": "shapes", "view": "update_scope"}),
    Rename(3, "tasks.*.shapes.*", {"share": "weight"}),
    Rename(3, "schedule.phases.*.tasks.*", {"buckets": "shapes"}),
    Rename(3, "schedule.phases.*.tasks.*.shapes.*", {"share": "weight"}),
    *(Rename(3, path, {"drop": "token_drop"}, of_modality(*IMAGES, *SOUNDS)) for path in _INPUTS),
    *(Rename(3, path, {"rate": "sample_rate", "gain": "gain_db", "level": "rms"},
             of_modality(*SOUNDS)) for path in _INPUTS),
    Rename(3, "tasks.*.evaluators.*", {"between": "modalities", "concept": "positive_key"},
           named("retrieval")),
    Rename(3, "tasks.*.objective", _CONTRASTIVE, named("contrastive", "coca")),
    Rename(3, "tasks.*.objective",
           {"between": "modalities", "concept": "positive_key", "joint": "embed_dim",
            "initial": "init_temperature"}, named("cross_modal")),
    Rename(3, "tasks.*.objective", {"reading": "readout"}, named("fusion")),
    Rename(3, "tasks.*.objective",
           {"ratio": "mask_ratio", "inner": "decoder_width", "depth": "decoder_depth",
            "heads_per_layer": "decoder_heads"}, named("masked_image")),
    Rename(3, "tasks.*.objective", _TRANSFUSION, named("transfusion")),
)  # fmt: skip

# Keys of earlier versions that moved into a block (`mmjax.core.migrations.MOVES`).
MOVED = {
    "untie": "per_modality.parts",
    "norm_modalities": "per_modality.modalities",
}


def new_name(key: str, known: Iterable[str]) -> str:
    """Return a sentence on what an old key is called today, empty if it is none of these or not in this block.

    Args:
      key: the key that the block does not have.
      known: the keys that it has.
    """
    known = set(known)
    renamed = [r.keys[key] for r in RENAMES if r.keys.get(key) in known]
    renamed += [MOVED[key]] if key in MOVED and MOVED[key].split(".")[0] in known else []
    return f" It is called '{renamed[0]}' now." if renamed else ""
