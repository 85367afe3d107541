"""SigLIP (Zhai et al. 2023): pictures and texts in two towers, each pair a decision of its own.

    mmjax build emoji
    mmjax train --config=siglip:b16 --workdir=runs/siglip-b16
    mmjax train --config=siglip:small --workdir=runs/siglip-small

A ViT whose tokens a learned query reads (multi-head attention pooling), and a transformer over texts that sees all
tokens at once, whose last token is the text. The loss is the logistic one of every picture with every text of the
global batch, with a learned scale and bias. Settings are `b16` and `so400m` (shape-optimised, patches of 14 pixels),
the published sizes, and `small`.

The paper's text is not at hand: all numbers are from memory, sizes as in the model configs of open_clip; that loss,
features and gradients are those of open_clip's model is tested (`tests/peers/`).

What differs, or is ours:

- The optimizer is AdamW with a cosine decay; theirs is Adafactor of big_vision, whose second moments decay by 0.95 at
  most, as here. Warm-up, steps and the crop are ours.
- A text's padding is hidden from its tokens and its vector is that of its end token; theirs attend to padding, and the
  vector is that of the last slot. For texts without padding both are one.
- Missing: training on WebLI, the sizes at more pixels, and zero-shot classification of ImageNet.

Pairs are the drawings and names that the data sets here hold. For your own, set `tasks.image_text.source` and
`tasks.image_text.evaluators.*.source` (records with `image`, an encoded picture; `caption`; `concept`, an integer that
pairs of one content share: `tasks.image_text.objective.positive_key` names it, an empty name where no two do), and
`modalities.text.tokenizer` with its number of pieces in `modalities.text.vocabulary`.

Hardware: unknown, no plan is committed. Results: none, the published sizes have not been trained here. `small`: a CPU
with 2 cores.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A size of SigLIP.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
    """

    size: Literal["b16", "so400m", "small"]


# Patch; width, MLP, heads and layers of both towers; tokens of a text.
SIZES = {
    "b16": (16, 768, 3072, 12, 12, 64),
    "so400m": (14, 1152, 4304, 16, 27, 16),
    "small": (8, 128, 512, 4, 4, 12),
}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def tower(width: int, hidden: int, heads: int, repeat: int) -> dict[str, Any]:
    block = {
        "name": "transformer", "num_heads": heads, "mlp_dim": hidden, "bias": True, "attention_bias": True,
    }  # fmt: skip
    return {"width": width, "layers": [{"repeat": repeat, "blocks": [block]}], "remat": "full"}


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    patch, width, hidden, heads, repeat, length = SIZES[setting.size]
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}
    config = ConfigDict(sort_keys=False)
    config.steps = 274_658
    config.seed = 0
    config.modalities = {
        "image": {
            "name": "image",
            "patch": patch,
            "max_positions": 224 // patch,
            "positions": "table",
            "tower": "image",
        },
        # No tokenizer: give one of 32,000 pieces.
        "text": {
            "name": "text",
            "tokenizer": "",
            "vocabulary": 32_000,
            "max_positions": length,
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
                "text": {"field": "caption", "length": length},
            },
            "objective": {
                "name": "contrastive", "modalities": ["image", "text"], "positive_key": "concept", "embed_dim": width,
                "loss": "sigmoid", "init_temperature": 0.1, "bias": -10.0,
                "poolers": {"image": "map", "text": "last"}, "map_heads": heads, "map_mlp": hidden,
                "projections": {"image": "none", "text": "affine"}, "chunk": 4096,
            },
            "batch": 32_768,
            "evaluators": {n: {"name": "retrieval", "source": s} for n, s in splits.items()},
        },
    }  # fmt: skip
    config.optimizer = {
        "algorithm": {"name": "adamw", "b1": 0.9, "b2": 0.95, "eps": 1e-8},
        "learning_rate": 1e-3, "warmup": 20_000, "decay": "cosine", "end_lr_ratio": 0.0,
        "weight_decay": 1e-4, "clip": 1.0,
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
    config.modalities.text.update({"tokenizer": "emoji/1.0.0/tokenizer.model", "vocabulary": 2048})
    for tower in config.model.towers.values():
        tower.remat = "none"
    task = config.tasks.image_text
    task.batch = 64
    task.inputs.image.size = 32
    task.objective.chunk = 0
    config.optimizer.update({"learning_rate": 2e-3, "warmup": 50})
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 200
    config.evaluation.batch = 256
