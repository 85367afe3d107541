"""LIMoE (Mustafa et al. 2022): one sparse tower for images and texts, trained contrastively.

    mmjax build emoji
    mmjax train --config=limoe:b16 --workdir=runs/limoe-b16
    mmjax train --config=limoe:small --workdir=runs/limoe-small

Both modalities pass one transformer, each attending to its own tokens, and tokens of both compete for the 32 experts of
every other layer: one expert a token, those first that the router is surest of. Settings are `b16`, `l16` and `h14`,
the published sizes, and `small`, with eight experts in each of two layers, of which pictures are to use five and texts
three. They have local and global entropy losses by modality beside the classic ones (importance, load and z); each also
with `-classic`, these alone, `-none`, no such loss, and `-dense`, no experts.

The paper's text is not at hand. Its abstract states that H/14 has 5.6 billion parameters, of which a token meets 675
million, as here; the block is a ViT's, with biases and a table of positions, as in V-MoE's code. From memory are batch,
steps, rate, warm-up, the place of the expert layers, their capacity, the thresholds (9 experts for texts, 20 for
images), and that the local entropy loss is for texts alone.

What differs, or is ours:

- The optimizer is AdamW with a cosine decay; theirs is Adafactor with momentum and an inverse square root.
- The weights of all losses, the crop and the 16 tokens of a text are ours.
- At least 256 groups of tokens compete for experts, so that none spans two of 256 devices.
- Missing: zero-shot classification of ImageNet with prompts, its 10-shot accuracy, and retrieval on COCO.

Pairs are the drawings and names that the data sets here hold. For your own, set `tasks.image_text.source` and
`tasks.image_text.evaluators.*.source` (records with `image`, an encoded picture; `caption`; `concept`, an integer that
pairs of one content share: `tasks.image_text.objective.positive_key` names it, an empty name where no two do), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: 256 chips of TPU v5e or 128 of v5p, by the plans in `plans/`; results: none, the published sizes have not been
trained here. `small`: a CPU with 2 cores, 300 steps of 9 GFLOP in 1 to 2 minutes, measured beside other work. Results
of 300 steps by Muon (three seeds, `benchmarks/results/imp.md`; of an earlier version, without biases and tables of
positions and with a local entropy loss of pictures): picture to text, recall at 10 of 51.9 % on drawings never seen
(chance 4.1 %; `-dense` 49.2 %) and 28.5 % on concepts never seen (3.5 %; 28.6 %); texts use 3 to 4 of the eight
experts, pictures 7 (`-classic`: 6 to 7, and 8).
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of LIMoE and its auxiliary losses.

    Attributes:
      size: size of the model; `small` has smaller pictures too.
      losses: entropies beside the classic ones, these alone, or none; `dense` has no experts.
    """

    size: Literal["b16", "l16", "h14", "small"]
    losses: Literal["entropies", "classic", "none", "dense"] = "entropies"


# Patch; width, MLP, heads; layers, and how many of the last are in pairs of which the second has experts.
SIZES = {
    "b16": (16, 768, 3072, 12, 12, 12),
    "l16": (16, 1024, 4096, 16, 24, 24),
    "h14": (14, 1280, 5120, 16, 32, 24),
    "small": (8, 128, 512, 4, 4, 4),
}
EXPERTS = {
    "count": 32,
    "router": {
        "name": "token_choice", "top_k": 1, "capacity": 1.05, "batch_priority": True, "noise": 1.0,
    },
    "group_size": 2048,
    "min_groups": 256,
    "losses": {"importance": 0.01, "load": 0.01, "z": 0.001},
}  # fmt: skip
ENTROPIES = {
    "local_entropy": {"text": 0.01},
    "global_entropy": {"text": 0.01, "image": 0.01},
    "entropy_floor": {"text": 2.197, "image": 2.996},  # log 9 and log 20
}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def layers(losses: str, repeat: int, paired: int, heads: int, hidden: int) -> list[dict[str, Any]]:
    """Return the trunk: `paired` of its layers, the last, take turns, dense and with experts."""
    block: dict[str, Any] = {
        "name": "transformer", "num_heads": heads, "mlp_dim": hidden, "bias": True, "attention_bias": True,
    }  # fmt: skip
    if losses == "dense":
        return [{"repeat": repeat, "blocks": [block]}]
    experts = {**EXPERTS, **(ENTROPIES if losses == "entropies" else {})}
    if losses == "none":
        del experts["losses"]
    pairs = {"repeat": paired // 2, "blocks": [block, {**block, "experts": experts}]}
    first = {"repeat": repeat - paired, "blocks": [block]}
    return [first, pairs] if repeat > paired else [pairs]


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    patch, width, hidden, heads, repeat, paired = SIZES[setting.size]
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}
    config = ConfigDict(sort_keys=False)
    config.steps = 781_250
    config.seed = 0
    config.modalities = {
        "image": {
            "name": "image",
            "patch": patch,
            "max_positions": 224 // patch,
            "positions": "table",
        },
        # No tokenizer: give one of 32,000 pieces.
        "text": {
            "name": "text",
            "tokenizer": "",
            "vocabulary": 32_000,
            "max_positions": 16,
            "positions": "table",
        },
    }
    config.model = {
        "width": width, "layers": layers(setting.losses, repeat, paired, heads, hidden), "remat": "full",
    }  # fmt: skip
    config.tasks = {
        "image_text": {
            "source": data("train"),
            "inputs": {
                "image": {"size": 224, "crop": 0.7},
                "text": {"field": "caption", "length": 16},
            },
            "objective": {
                "name": "contrastive", "modalities": ["image", "text"], "positive_key": "concept", "embed_dim": width,
                "init_temperature": 0.1, "joint_forward": True, "chunk": 4096,
            },
            "batch": 16_384,
            "evaluators": {n: {"name": "retrieval", "source": s} for n, s in splits.items()},
        },
    }  # fmt: skip
    config.optimizer = {
        "algorithm": {"name": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "learning_rate": 1e-3, "warmup": 10_000, "decay": "cosine", "end_lr_ratio": 0.0,
        "weight_decay": 0.01, "clip": 1.0,
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
    if setting.losses != "dense":
        config.mesh.expert = 32
    config.checkpoint = {"every": 5_000, "keep": 2}
    config.evaluation = {"every": 0, "batch": 4096}
    if setting.size == "small":
        make_small(config)
    return config


def make_small(config: ConfigDict) -> None:
    """Set the numbers of `small` that go with smaller pictures, shorter texts and a shorter run."""
    config.steps = 600
    config.modalities.image.max_positions = 4
    config.modalities.text.update(
        {"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048, "max_positions": 12}
    )
    for experts in (
        b["experts"] for g in config.model.layers for b in g["blocks"] if "experts" in b
    ):
        experts.update({"count": 8, "group_size": 512, "min_groups": 1})
        if "entropy_floor" in experts:
            experts["entropy_floor"] = {"text": 1.0986, "image": 1.6094}  # log 3 and log 5
    config.model.remat = "none"
    task = config.tasks.image_text
    task.batch = 64
    task.inputs.image.size = 32
    task.inputs.text.length = 12
    task.objective.update({"embed_dim": 96, "chunk": 0})
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 200
    config.evaluation.batch = 256
