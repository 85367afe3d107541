"""LiT (Zhai et al. 2022): a frozen tower of pictures, and a tower of texts that learns to read it.

    mmjax build emoji
    mmjax train --config=lit:b16 --workdir=runs/lit-b16 --config.init_from.path=runs/pictures
    mmjax train --config=lit:small --workdir=runs/lit-small

The tower of pictures and its stem are frozen by `optimizer.rules`: no update, no optimizer state, no gradient. Set
`init_from.path` to a run or file with a tower `image` that has learned from pictures alone; without it the tower stays
as it began, and texts learn to name random features. The texts' tower is a transformer over all tokens, mapped to the
width of the pictures. Settings are `b16`, the published size, and `small`.

The paper's text is not at hand: all numbers are from memory, sizes those of a ViT-B/16 and of BERT base.

What differs, or is ours:

- The optimizer is AdamW with a cosine decay; theirs is Adafactor. The crop is ours.
- The vector of a text is that of its end token, which sees all others; theirs is that of a token at its beginning.
- The blocks of the texts are a ViT's, with their norms before attention and MLP; those of BERT have them after.
- Missing: weights learned from ImageNet-21k, CC12M and YFCC, and zero-shot classification of ImageNet.

Pairs are the drawings and names that the data sets here hold. For your own, set `tasks.image_text.source` and
`tasks.image_text.evaluators.*.source` (records with `image`, an encoded picture; `caption`; `concept`, an integer that
pairs of one content share: `tasks.image_text.objective.positive_key` names it, an empty name where no two do), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: unknown, no plan is committed. Results: none, the published size has not been trained here. `small`: a CPU
with 2 cores.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of LiT.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
    """

    size: Literal["b16", "small"]


# Patch; width, MLP, heads and layers of both towers.
SIZES = {"b16": (16, 768, 3072, 12, 12), "small": (8, 128, 512, 4, 4)}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def tower(width: int, hidden: int, heads: int, repeat: int) -> dict[str, Any]:
    block = {
        "name": "transformer", "num_heads": heads, "mlp_dim": hidden, "bias": True, "attention_bias": True,
    }  # fmt: skip
    return {"width": width, "layers": [{"repeat": repeat, "blocks": [block]}], "remat": "full"}


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    patch, width, hidden, heads, repeat = SIZES[setting.size]
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}
    config = ConfigDict(sort_keys=False)
    config.steps = 55_000
    config.seed = 0
    config.modalities = {
        "image": {
            "name": "image",
            "patch": patch,
            "max_positions": 224 // patch,
            "positions": "table",
            "class_token": True,
            "tower": "image",
        },
        # No tokenizer: give one of 32,000 pieces.
        "text": {
            "name": "text",
            "tokenizer": "",
            "vocabulary": 32_000,
            "max_positions": 16,
            "positions": "table",
            "tower": "text",
        },
    }
    config.model = {
        "towers": {name: tower(width, hidden, heads, repeat) for name in ("image", "text")}
    }
    config.tasks = {
        "image_text": {
            "source": data("train"),
            "inputs": {
                "image": {"size": 224, "crop": 0.7},
                "text": {"field": "caption", "length": 16},
            },
            "objective": {
                "name": "contrastive", "modalities": ["image", "text"], "positive_key": "concept", "embed_dim": width,
                "init_temperature": 0.1, "poolers": {"image": "class", "text": "last"},
                "projections": {"image": "none", "text": "affine"}, "chunk": 4096,
            },
            "batch": 16_384,
            "evaluators": {n: {"name": "retrieval", "source": s} for n, s in splits.items()},
        },
    }  # fmt: skip
    config.optimizer = {
        "algorithm": {"name": "adamw", "b1": 0.9, "b2": 0.999, "eps": 1e-8},
        "learning_rate": 1e-3, "warmup": 10_000, "decay": "cosine", "end_lr_ratio": 0.0,
        "weight_decay": 1e-4, "clip": 1.0,
        "rules": [{"match": "(image|stems/image)/.*", "freeze": True}],
    }  # fmt: skip
    config.dtype = {"compute": "bfloat16"}
    config.mesh = {"data": 1, "fsdp": -1}
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
    for tower in config.model.towers.values():
        tower.remat = "none"
    task = config.tasks.image_text
    task.batch = 64
    task.inputs.image.size = 32
    task.inputs.text.length = 12
    task.objective.chunk = 0
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 200
    config.evaluation.batch = 256
