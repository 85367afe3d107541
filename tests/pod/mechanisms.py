"""Small models that together have every block, router, objective and modality, and the meshes each is compared on.

    python tests/pod/mechanisms.py OUT.json

A task is compared on an axis alone where that axis does something special to it, and on a mesh of several axes. An
update depends on how parameters lie and not on what made their gradient, so that it is compared on some meshes of a
model only: parameters are whole along `data` and `sequence`, and an axis that cuts them cuts those of all models alike.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharded import CASES, DEVICES, EPS, GRADIENT, RATES, WHOLE, compare, write

from mmjax.core.config import Block

DATA, FSDP, EXPERT = "data 8", "fsdp 8", "expert 8"
TENSOR, SEQUENCE = "tensor 8", "sequence 8"
MIXED_ROWS, MIXED_EXPERT = "data 2 sequence 4", "data 2 expert 2 tensor 2"
MIXED_SEQUENCE, MIXED_TENSOR = "data 2 fsdp 2 sequence 2", "data 2 fsdp 2 tensor 2"

MODALITIES: dict[str, Block] = {
    "image": {"name": "image", "patch": 4, "max_positions": 8},
    "video": {
        "name": "video", "tube": 2, "patch": 8, "max_time_positions": 2, "max_positions": 8,
        "positions": "table",
    },
    "text": {"name": "text", "vocabulary": 64, "max_positions": 16},
    "colours": {"name": "colours", "levels": 8, "positions": "none"},
    "spectrogram": {
        "name": "spectrogram", "patch_frames": 4, "patch_mels": 64, "sample_rate": 11025, "window": 512,
        "high": 5500.0, "max_positions": 8,
    },
    "waveform": {"name": "waveform", "patch": 256, "sample_rate": 11025, "max_positions": 16},
}  # fmt: skip
# Every stream's length divides over eight devices.
VIEWS: dict[str, Block] = {
    "image": {"size": 32},
    "video": {"frames": 4, "size": 32},
    "text": {"field": "caption", "length": 16},
    "colours": {"size": 4},
    "spectrogram": {"frames": 32},
    "waveform": {"samples": 4096},
}
ADAMW: Block = {**RATES, "algorithm": {"name": "adamw", "eps": EPS}}
MUON: Block = {**RATES, "algorithm": {"name": "muon", "eps": EPS, "moments_dtype": "bfloat16"}}


@dataclass(frozen=True)
class Trial:
    """A model with tasks that are compared with one device.

    Attributes:
      layers: the blocks of the trunk's one group, which is repeated twice under a scan.
      tasks: objective and rows by name.
      meshes: of each task, keys of `CASES`.
      depths: what is compiled by mesh, see `compare`.
      positions: of all modalities where not empty.
      towers: the tower of each modality with its keys, in place of one trunk.
      teachers: copies of parameters that the objectives read.
    """

    layers: list[Block]
    tasks: Mapping[str, Block]
    meshes: Mapping[str, tuple[str, ...]]
    depths: Mapping[str, str]
    optimizer: Block
    positions: str = ""
    towers: Mapping[str, Block] = field(default_factory=dict)
    teachers: Mapping[str, Block] = field(default_factory=dict)

    def block(self) -> Block:
        """Return the config."""
        names = sorted({name for task in self.tasks.values() for name in task["inputs"]})
        keys: dict[str, Block] = {
            name: {"positions": self.positions} if self.positions else {} for name in names
        }
        tower = {"width": 32, "layers": [{"repeat": 2, "blocks": self.layers}]}
        model = {**tower, "teachers": dict(self.teachers)}
        if self.towers:
            model = {
                "towers": {f"{name}_tower": {**tower, **own} for name, own in self.towers.items()}
            }
            keys = {name: {**own, "tower": f"{name}_tower"} for name, own in keys.items()}
            keys["image"]["class_token"] = True
        return {
            "modalities": {name: {**MODALITIES[name], **keys[name]} for name in names},
            "steps": 10,
            "model": model,
            "tasks": {
                name: {"source": {"name": "array_record", "path": "none"}, **task}
                for name, task in self.tasks.items()
            },
            "optimizer": self.optimizer,
            "dtype": {"parameters": "float64", "compute": "float64"},
        }

    def tasks_of(self) -> dict[str, list[str]]:
        """Return the tasks that are compared on each mesh, meshes in the order of `CASES`."""
        tasks = {case: [t for t, cases in self.meshes.items() if case in cases] for case in CASES}
        return {case: names for case, names in tasks.items() if names}


def task(
    inputs: str, name: str, rows: int = DEVICES, views: Mapping[str, Block] = {}, **settings: Any
) -> Block:
    """Return a task on modalities separated by spaces, with keys of `views` added to `VIEWS`."""
    merged = {
        modality: {**VIEWS[modality], **views.get(modality, {})} for modality in inputs.split()
    }
    return {"inputs": merged, "objective": {"name": name, **settings}, "batch": rows}


def layer(name: str = "transformer", **settings: Any) -> Block:
    """Return a block whose sizes divide over eight devices."""
    return {"name": name, "num_heads": 8, "mlp_dim": 64, **settings}


def routed(count: int, router: Block, **settings: Any) -> Block:
    """Return experts whose groups of tokens do not reach over devices."""
    return {"count": count, "router": router, "group_size": 8, "min_groups": 8, **settings}


PAIR = {"modalities": ["image", "text"], "positive_key": "concept", "embed_dim": 32}
CLASSES = {"classes": 16, "label": "label", "init": "lecun"}
HEARD = {"modalities": ["spectrogram", "waveform"], **CLASSES}
SEEN = {"modalities": ["video", "spectrogram"], **CLASSES}
CHOICE = {"name": "token_choice", "batch_priority": True, "noise": 1.0}
LOSSES = {
    "losses": {"importance": 0.01, "load": 0.01, "z": 0.001},
    "local_entropy": {"text": 0.01},
    "global_entropy": {"text": 0.01, "image": 0.01},
}
PACKED = {"pack": 2, "window": 2, "reverse_prob": 0.2, "condition_dropout": 0.1}
COPIES = {"text": "text", "colours": "seen", "image": "seen"}

TRIALS: dict[str, Trial] = {
    # Attention, MLP, stems and heads; rows that are compared with those of all devices.
    "dense": Trial(
        [layer()],
        {
            "softmax": task("image text", "contrastive", **PAIR),
            "chunked": task("image text", "contrastive", rows=16, chunk=8, **PAIR),
            "sigmoid": task("image text", "contrastive", loss="sigmoid", **PAIR),
            "bags": task("video spectrogram text", "cross_modal", embed_dim=32,
                         modalities=["video", "spectrogram", "text"],
                         views={"video": {"token_drop": 0.5}, "text": {"instances": 2}}),
            "classes": task("spectrogram waveform", "classification", **HEARD),
            "masked": task("image", "masked_image", decoder_width=64, decoder_depth=1, decoder_heads=2),
            "zorro": task("video spectrogram", "fusion", tokens=8, mask="zorro", readout="each", **SEEN),
        },
        {
            "softmax": (DATA, FSDP, TENSOR, SEQUENCE, MIXED_SEQUENCE, MIXED_TENSOR),
            "chunked": (DATA, MIXED_ROWS),
            "sigmoid": (DATA, MIXED_ROWS),
            "bags": (MIXED_ROWS,),
            "classes": (MIXED_ROWS,),
            "masked": (MIXED_ROWS,),
            "zorro": (MIXED_ROWS,),
        },
        {
            DATA: GRADIENT, SEQUENCE: GRADIENT, MIXED_ROWS: GRADIENT, MIXED_SEQUENCE: WHOLE, MIXED_TENSOR: WHOLE,
        },
        ADAMW,
    ),
    # All routers; tokens of both modalities compete.
    "experts": Trial(
        [
            layer(experts=routed(16, {"name": "expert_choice"}), qk_norm=True),
            layer(experts=routed(16, CHOICE, **LOSSES)),
            layer(experts=routed(8, {"name": "soft", "slots_per_expert": 2})),
        ],
        {"together": task("image text", "contrastive", joint_forward=True, **PAIR)},
        {"together": (EXPERT, SEQUENCE, MIXED_EXPERT)},
        {SEQUENCE: GRADIENT, MIXED_EXPERT: WHOLE},
        ADAMW,
    ),
    # Sequences of several items, a copy of layers per modality, a recurrence, and a U-Net.
    "packed": Trial(
        [
            layer(
                per_modality={"parts": ["query", "mlp"], "modalities": COPIES}, norm="rms", mlp="swiglu", rotary=1e4,
                qk_norm="layer", norm_position="post",
                experts=routed(
                    8, {"name": "expert_choice", "score": "sigmoid"}, causal={"mlp_dim": 32}
                ),
            ),
            {"name": "mamba", "state": 8, "norm": "rms",
             "per_modality": {"parts": ["in", "x", "dt", "out"], "modalities": COPIES}},
        ],
        {
            "draw": task(
                "text image", "transfusion", rows=16, views={"image": {"size": 16}}, unet_channels=4,
                modalities=["text", "image"],
                capacity={"text": 32}, **PACKED,
            ),
            "write": task(
                "text colours", "transfusion", rows=16, modalities=["text", "colours"],
                discrete=["text", "colours"], capacity={"text": 32}, **PACKED,
            ),
        },
        {
            "draw": (SEQUENCE, TENSOR, MIXED_SEQUENCE),
            "write": (EXPERT, MIXED_SEQUENCE),
        },
        {SEQUENCE: GRADIENT, TENSOR: GRADIENT, EXPERT: GRADIENT},
        ADAMW,
        positions="none",
    ),
    # Two more trunks, cross attention and poolers; matrices that Muon makes orthogonal.
    "coca": Trial(
        [layer()],
        {
            "captions": task(
                "image text", "coca", **PAIR, unimodal=[{"repeat": 2, "blocks": [layer()]}],
                multimodal=[
                    {"repeat": 2, "blocks": [layer("cross_transformer", context_norm=True)]},
                    {"repeat": 1, "blocks": [layer("gated_cross_attention")]},
                ],
                pooler_heads=8, queries=8, pooling="cascade", pooler_bias=True, pooler_norms=True,
                remat="full", chunk=4,
            ),
        },
        {"captions": (TENSOR, SEQUENCE, MIXED_TENSOR)},
        {TENSOR: GRADIENT, SEQUENCE: GRADIENT, MIXED_TENSOR: WHOLE},
        MUON,
    ),
    # Two towers of different widths: a class token and a norm before the layers, and a causal one; attention pooling.
    "towers": Trial(
        [layer(bias=True, attention_bias=True, mlp="quick_gelu")],
        {
            "pairs": task("image text", "contrastive", poolers={"image": "class", "text": "map"}, **PAIR),
        },
        {"pairs": (DATA, FSDP, TENSOR, MIXED_TENSOR)},
        {DATA: GRADIENT, FSDP: GRADIENT, TENSOR: GRADIENT, MIXED_TENSOR: WHOLE},
        ADAMW,
        towers={"image": {"first_norm": True}, "text": {"width": 64, "causal": True}},
    ),
    # A moving average that two objectives read, and a sum of objectives whose passes are shared.
    "taught": Trial(
        [layer()],
        {
            "byol": task("image", "byol", views={"image": {"instances": 2}}, hidden=32, embed_dim=32),
            "simdino": task("image", "simdino", views={"image": {"instances": 2}}, hidden=32, embed_dim=32),
            "sum": task(
                "image text", "sum",
                members={
                    "pairs": {"objective": {"name": "contrastive", **PAIR}},
                    "classes": {"objective": {"name": "classification", **CLASSES}, "weight": 0.5},
                },
            ),
        },
        {"byol": (MIXED_TENSOR,), "simdino": (DATA, MIXED_TENSOR), "sum": (DATA, MIXED_TENSOR)},
        {DATA: GRADIENT, MIXED_TENSOR: WHOLE},
        ADAMW,
        teachers={"target": {"of": ["stems/image/.*", "trunk/.*", "heads/.*/projector/.*"]}},
    ),
    # A trunk per modality that tokens of a bottleneck join.
    "bottleneck": Trial(
        [
            layer("bottleneck", modalities=["video", "spectrogram"], bias=True, fuse=False),
            layer("bottleneck", modalities=["video", "spectrogram"], attention_bias=True, fuse=True),
        ],
        {
            "sounds": task("video spectrogram", "fusion", tokens=8, mask="full", readout="mean", loss="each",
                           shared=True, **SEEN),
        },
        {"sounds": (TENSOR, SEQUENCE, MIXED_SEQUENCE)},
        {TENSOR: GRADIENT, SEQUENCE: GRADIENT},
        MUON,
    ),
}  # fmt: skip


def main() -> None:
    """Compare all trials and write the results."""
    write(
        sys.argv[1], {n: compare(n, t.block(), t.tasks_of(), t.depths) for n, t in TRIALS.items()}
    )


if __name__ == "__main__":
    main()
