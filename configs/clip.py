"""CLIP (Radford et al. 2021): a tower of pictures and a tower of texts, trained to find each other.

    mmjax build emoji
    mmjax train --config=clip:b32 --workdir=runs/clip-b32
    mmjax train --config=clip:small --workdir=runs/clip-small

Two transformers of different widths: a ViT with a class token and a norm before its layers, whose class token is the
picture, and a causal transformer, whose token at the end of a text is the text. Each is mapped to the joint space
without a bias, and the loss is the cross-entropy of pairs in both directions over the global batch. Settings are `b32`,
`b16` and `l14`, the published sizes, and `small`.

The paper's text is not at hand: sizes, batch, rates, warm-up, weight decay and the constants of Adam are from memory,
sizes as in the model configs of open_clip; that loss, features and gradients are those of open_clip's model is tested
(`tests/peers/`).

What differs, or is ours:

- The map of patches to tokens has a bias, and the class token is one vector, where theirs is a sum of two. A text has
  no token of its beginning.
- The crop of pictures is ours: theirs is a random square of the resized picture. So are the 32 bits of the parameters
  under a compute dtype of bfloat16, and clipping of the gradient.
- Missing: the last epoch of L/14 at 336 pixels, zero-shot classification of ImageNet with prompts, and linear probes.

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
    """A size of CLIP.

    Attributes:
      size: size of the model; `small` has smaller pictures and shorter texts too.
    """

    size: Literal["b32", "b16", "l14", "small"]


# Patch; width, heads and layers of the pictures' tower; the same of the texts'; size of the joint space; rate.
SIZES = {
    "b32": (32, (768, 12, 12), (512, 8, 12), 512, 5e-4),
    "b16": (16, (768, 12, 12), (512, 8, 12), 512, 5e-4),
    "l14": (14, (1024, 16, 24), (768, 12, 12), 768, 4e-4),
    "small": (8, (128, 4, 4), (96, 4, 4), 96, 2e-3),
}


def data(split: str) -> dict[str, Any]:
    return {"name": "tfds", "dataset": "emoji", "split": split}


def tower(width: int, heads: int, repeat: int, **keys: Any) -> dict[str, Any]:
    """Return a tower of a ViT's layers with CLIP's GELU."""
    block = {
        "name": "transformer", "num_heads": heads, "mlp_dim": 4 * width, "mlp": "quick_gelu",
        "bias": True, "attention_bias": True, "eps": 1e-5,
    }  # fmt: skip
    groups = [{"repeat": repeat, "blocks": [block]}]
    return {"width": width, "layers": groups, "norm_eps": 1e-5, "remat": "full", **keys}


def get_config(setting: Setting) -> ConfigDict:
    """Return the config of a setting."""
    patch, image, text, joint, rate = SIZES[setting.size]
    splits = {"drawings": data("test_drawing"), "concepts": data("test_concept")}
    config = ConfigDict(sort_keys=False)
    config.steps = 390_625
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
        # No tokenizer: give one of 49,408 pieces.
        "text": {
            "name": "text",
            "tokenizer": "",
            "vocabulary": 49_408,
            "max_positions": 77,
            "positions": "table",
            "tower": "text",
        },
    }
    config.model = {
        "towers": {"image": tower(*image, first_norm=True), "text": tower(*text, causal=True)},
    }
    config.tasks = {
        "image_text": {
            "source": data("train"),
            "inputs": {
                "image": {"size": 224, "crop": 0.9},
                "text": {"field": "caption", "length": 77},
            },
            "objective": {
                "name": "contrastive", "modalities": ["image", "text"], "positive_key": "concept", "embed_dim": joint,
                "init_temperature": 0.07, "poolers": {"image": "class", "text": "last"}, "chunk": 4096,
            },
            "batch": 32_768,
            "evaluators": {n: {"name": "retrieval", "source": s} for n, s in splits.items()},
        },
    }  # fmt: skip
    config.optimizer = {
        "algorithm": {"name": "adamw", "b1": 0.9, "b2": 0.98, "eps": 1e-6},
        "learning_rate": rate, "warmup": 2_000, "decay": "cosine", "end_lr_ratio": 0.0,
        "weight_decay": 0.2, "clip": 1.0,
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
    config.optimizer.warmup = 50
    config.dtype.compute = "float32"
    config.mesh = {"data": -1}
    config.checkpoint.every = 200
    config.evaluation.batch = 256
